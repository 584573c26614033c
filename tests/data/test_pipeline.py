"""Batches: every target once, the same rows from the same seed, and a resumed stream that goes on exactly."""

import itertools
from collections import Counter

import grain
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from gshardx.data.pipeline import cut, evaluation_rows, training_rows
from gshardx.errors import BadInput

NAMES = ("tokens", "targets", "segments", "positions", "weights")


def document(length, first=0):
    return np.arange(first, first + length, dtype=np.int32)


def pieces_of(lengths):
    """Pieces whose every token is found nowhere else: 1, 2, 3 ..."""
    starts = itertools.accumulate(lengths, initial=1)
    return [document(length, start) for length, start in zip(lengths, starts, strict=False)]


def pieces_in(rows):
    """The tokens of each segment, in order, after checks of what every batch keeps."""
    assert {name: array.dtype for name, array in rows.items()} == {
        "tokens": np.int32,
        "targets": np.int32,
        "segments": np.int32,
        "positions": np.int32,
        "weights": np.float32,
    }
    np.testing.assert_array_equal(rows["tokens"][:, 1:], rows["targets"][:, :-1])
    found = []
    for row in range(len(rows["tokens"])):
        tokens, targets, segments, positions, weights = (rows[name][row] for name in NAMES)
        real = segments > 0
        assert (real[:-1] >= real[1:]).all()  # padding comes last
        assert not tokens[~real].any()
        assert not weights[~real].any()
        for number in range(1, segments.max() + 1):
            here = np.flatnonzero(segments == number)
            assert (np.diff(here) == 1).all()
            np.testing.assert_array_equal(positions[here], np.arange(len(here)))
            np.testing.assert_array_equal(weights[here[:-1]], 1.0)
            # Only in the last column can a segment's last token have a target of its own.
            assert weights[here[-1]] == 0.0 or here[-1] == len(tokens) - 1
            found.append((*tokens[here].tolist(), *targets[here[-1:]][weights[here[-1:]] > 0].tolist()))
    return found


def equal(one, other):
    return all(np.array_equal(one[name], other[name]) for name in one)


documents = st.lists(st.integers(2, 40), min_size=1, max_size=6).map(pieces_of)


@settings(max_examples=100, deadline=None)
@given(documents=documents, length=st.integers(1, 20))
def test_every_token_but_a_documents_first_is_a_target_exactly_once(documents, length):
    assume(sum(map(len, documents)) > length)
    pieces = cut(documents, length)
    assert all(2 <= len(piece) <= length + 1 for piece in pieces)
    targets = Counter(int(token) for piece in pieces for token in piece[1:])
    assert targets == Counter(int(token) for ids in documents for token in ids[1:])
    before = {int(b): int(a) for ids in documents for a, b in itertools.pairwise(ids)}
    assert all(before[int(b)] == int(a) for piece in pieces for a, b in itertools.pairwise(piece))


def test_a_text_shorter_than_a_sequence_names_a_length_that_works():
    short = [document(5), document(4)]
    with pytest.raises(BadInput, match=r"9 tokens.*sequence of 9 .*data\.sequence_length = 8"):
        cut(short, 9)
    assert cut(short, 8)
    with pytest.raises(BadInput):
        cut([], 8)


def test_a_document_of_one_token_has_nothing_to_predict():
    (piece,) = cut([document(1), document(5, 7), document(0)], 4)
    np.testing.assert_array_equal(piece, [7, 8, 9, 10, 11])


mixed = st.lists(st.integers(2, 9), min_size=1, max_size=8).map(pieces_of)


@settings(max_examples=25, deadline=None)
@given(pieces=mixed, rows=st.integers(1, 3), seed=st.integers(0, 99))
def test_packed_rows_hold_whole_pieces_and_no_piece_twice_before_all_have_come(pieces, rows, seed):
    whole = {tuple(piece.tolist()) for piece in pieces}
    seen = Counter(dict.fromkeys(whole, 0))
    for batch in itertools.islice(training_rows(pieces, 8, rows, seed), 8):  # a batch takes a piece at least
        assert batch["tokens"].shape == (rows, 8)
        found = pieces_in(batch)
        assert set(found) <= whole
        seen.update(found)
        assert (batch["segments"] > 0).any(axis=1).all()  # no empty row
        assert max(seen.values()) - min(seen.values()) <= 1
    assert min(seen.values()) >= 1


def test_short_documents_share_a_row():
    batch = next(training_rows(pieces_of([3] * 12), 8, 2, 0))
    assert batch["segments"].max() == 3
    assert (batch["segments"] > 0).all()
    assert batch["weights"].tolist() == [[1, 1, 0, 1, 1, 0, 1, 1]] * 2  # no target is another document's


def test_the_order_changes_from_epoch_to_epoch():
    stream = training_rows(pieces_of([9] * 16), 8, 16, 0)
    first, second = next(stream), next(stream)
    assert sorted(pieces_in(first)) == sorted(pieces_in(second))
    assert not equal(first, second)


def test_rows_are_a_function_of_the_seed_alone():
    pieces = pieces_of([9, 4, 5, 7, 3, 9, 2])

    def read(seed):
        return list(itertools.islice(training_rows(pieces, 8, 2, seed), 8))

    first = read(7)
    np.random.seed(1)  # whatever the program does with NumPy's own generator
    assert all(map(equal, first, read(7)))
    assert not all(map(equal, first, read(8)))


@settings(max_examples=15, deadline=None)
@given(pieces=mixed, rows=st.integers(1, 3), steps=st.integers(0, 8), seed=st.integers(0, 9))
def test_a_restored_state_goes_on_where_it_was_taken(pieces, rows, steps, seed):
    stream = training_rows(pieces, 8, rows, seed)
    for _ in range(steps):
        next(stream)
    state = stream.get_state()
    expected = list(itertools.islice(stream, 3))
    fresh = training_rows(pieces, 8, rows, seed)
    fresh.set_state(state)
    assert all(map(equal, expected, itertools.islice(fresh, 3)))
    stream.set_state(state)  # and back again on a stream that has gone further
    assert all(map(equal, expected, itertools.islice(stream, 3)))


class _FirstRows:
    """A few batches of the endless stream, as Grain's own checkpoint test wants them: finite."""

    def __init__(self, count):
        self.count = count

    def __iter__(self):
        return _Limited(training_rows(pieces_of([9, 4, 5, 7, 3, 9, 2]), 8, 2, 3), self.count)


class _Limited:
    def __init__(self, stream, count):
        self.stream, self.count, self.done = stream, count, 0

    def __iter__(self):
        return self

    def __next__(self):
        if self.done == self.count:
            raise StopIteration
        self.done += 1
        return next(self.stream)

    def get_state(self):
        return {"done": self.done, "stream": self.stream.get_state()}

    def set_state(self, state):
        self.done = state["done"]
        self.stream.set_state(state["stream"])


def test_grains_own_checkpoint_test_passes():
    grain.experimental.assert_equal_output_after_checkpoint(_FirstRows(9))


def test_every_piece_comes_once_an_epoch():
    pieces = pieces_of([9] * 12)
    stream = training_rows(pieces, 8, 2, 5)
    for _ in range(2):
        seen = [piece for batch in itertools.islice(stream, 6) for piece in pieces_in(batch)]
        assert sorted(seen) == [tuple(piece.tolist()) for piece in pieces]


@settings(max_examples=100, deadline=None)
@given(lengths=st.lists(st.integers(0, 40), max_size=6), length=st.integers(1, 12), rows=st.integers(1, 4))
def test_evaluation_scores_every_token_but_a_documents_first_once_from_half_a_sequence_at_least(lengths, length, rows):
    whole = pieces_of(lengths)
    start_of = {int(token): int(ids[0]) for ids in whole for token in ids}
    scored = []
    for batch in evaluation_rows(whole, length, rows):
        assert batch["tokens"].shape == (rows, length)
        pieces_in_order = zip(*(batch[name] for name in NAMES), strict=True)
        for tokens, targets, segments, positions, weights in pieces_in_order:
            assert set(weights.tolist()) <= {0.0, 1.0}
            assert not weights[segments == 0].any()
            np.testing.assert_array_equal(positions, np.arange(length))
            np.testing.assert_array_equal(targets[segments > 0], tokens[segments > 0] + 1)
            for column in np.flatnonzero(weights):
                target = int(targets[column])
                assert start_of[target] == start_of[int(tokens[0])]
                assert column + 1 >= min(target - start_of[target], length / 2)
                scored.append(target)
    assert scored == [int(token) for ids in whole for token in ids[1:]]


def test_the_last_batch_of_an_evaluation_is_filled_with_padding():
    *_, last = evaluation_rows(pieces_of([9, 9, 9]), 8, 2)
    assert last["segments"].tolist() == [[1] * 8, [0] * 8]
    assert last["weights"].tolist() == [[1.0] * 8, [0.0] * 8]
    assert not last["tokens"][1].any()


def test_an_evaluation_of_nothing_has_no_batches():
    assert list(evaluation_rows([], 8, 2)) == []
