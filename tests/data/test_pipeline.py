"""Batches: every target once, the same rows from the same seed, and a resumed stream that goes on exactly."""

import itertools
import json
import random

import grain
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from gshardx.data.blocks import Mixture
from gshardx.data.corpora import MemoryCorpus
from gshardx.data.pipeline import RowDataset, evaluation_rows, training_rows
from gshardx.errors import BadInput
from gshardx.layers import Packed

NAMES = ("tokens", "targets", "segments", "positions", "weights")


def document(length, first=0):
    return np.arange(first, first + length, dtype=np.int32)


def pieces_of(lengths):
    """Pieces whose every token is found nowhere else: 1, 2, 3 ..."""
    starts = itertools.accumulate(lengths, initial=1)
    return [document(length, start) for length, start in zip(lengths, starts, strict=False)]


def segments_in(rows):
    """The (token, target) pairs of each segment, in order, after checks of what every batch keeps."""
    assert {name: array.dtype for name, array in rows.items()} == {
        "tokens": np.int32,
        "targets": np.int32,
        "segments": np.int32,
        "positions": np.int32,
        "weights": np.float32,
    }
    found = []
    for tokens, targets, segments, positions, weights in zip(*(rows[name] for name in NAMES), strict=True):
        real = segments > 0
        assert (real[:-1] >= real[1:]).all()  # padding comes last
        assert not tokens[~real].any()
        np.testing.assert_array_equal(weights, real)
        for number in range(1, segments.max() + 1):
            here = np.flatnonzero(segments == number)
            assert (np.diff(here) == 1).all()
            np.testing.assert_array_equal(positions[here], np.arange(len(here)))
            found.append(list(zip(tokens[here].tolist(), targets[here].tolist(), strict=True)))
    return found


def equal(one, other):
    return all(np.array_equal(one[name], other[name]) for name in one)


def mixture(documents, length, packing="first_fit", seed=0):
    return Mixture([MemoryCorpus(documents)], [np.zeros(len(documents), bool)], [1.0], length, packing, seed)


def stream(documents, length, rows, packing="first_fit", seed=0, mine=None):
    return training_rows(mixture(documents, length, packing, seed), length, rows, mine)


def epoch_of(documents, length, packing, seed=0):
    """All rows of the first epoch, one a batch."""
    made = mixture(documents, length, packing, seed)
    blocks = list(itertools.takewhile(lambda block: block is not None, (made.block(0, n) for n in itertools.count())))
    rows = training_rows(made, length, 1)
    return [next(rows) for _ in range(sum(block.rows for block in blocks))]


packings = st.sampled_from(["first_fit", "best_fit", "concatenate"])
lengths_of_documents = st.lists(st.integers(2, 40), min_size=1, max_size=12)


@settings(max_examples=40, deadline=None)
@given(lengths=lengths_of_documents, length=st.integers(1, 20), packing=packings, seed=st.integers(0, 9))
def test_an_epoch_predicts_every_token_but_a_documents_first_once_from_its_own_document(lengths, length, packing, seed):
    whole = pieces_of(lengths)
    assume(sum(lengths) - len(lengths) >= length)
    before = {int(b): int(a) for ids in whole for a, b in itertools.pairwise(ids)}
    targets = []
    for row in epoch_of(whole, length, packing, seed):
        for pairs in segments_in(row):
            assert all(before[target] == token for token, target in pairs)
            assert all(target == after for (_, target), (after, _) in itertools.pairwise(pairs))  # without a gap
            targets += [target for _, target in pairs]
    assert sorted(targets) == sorted(before)


@settings(max_examples=15, deadline=None)
@given(lengths=lengths_of_documents, length=st.integers(1, 20), seed=st.integers(0, 9))
def test_pieces_are_whole_and_begin_at_multiples_of_a_sequence(lengths, length, seed):
    whole = pieces_of(lengths)
    assume(sum(lengths) - len(lengths) >= length)
    expected = {
        tuple(ids[start : start + length + 1].tolist()) for ids in whole for start in range(0, len(ids) - 1, length)
    }
    for packing in ("first_fit", "best_fit"):
        found = [
            (pairs[0][0], *(target for _, target in pairs))
            for row in epoch_of(whole, length, packing, seed)
            for pairs in segments_in(row)
        ]
        assert sorted(found) == sorted(expected)


def test_concatenation_leaves_no_padding_but_at_the_end_of_an_epoch():
    rows = epoch_of(pieces_of([7, 2, 31, 5, 19, 3]), 6, "concatenate")
    padding = sorted(int((row["segments"] == 0).sum()) for row in rows)
    assert padding[:-1] == [0] * (len(rows) - 1)
    assert padding[-1] < 6


def test_short_documents_share_a_row():
    batch = next(stream(pieces_of([3] * 12), 8, 2))
    assert batch["segments"].tolist() == [[1, 1, 2, 2, 3, 3, 4, 4]] * 2
    assert batch["positions"].tolist() == [[0, 1] * 4] * 2
    assert (batch["weights"] == 1).all()


def test_no_token_sees_another_document():
    """The mask that attention makes of a row's segments, against the documents that its tokens come from."""
    whole = pieces_of([5, 3, 9, 4, 12, 3, 2, 7])
    of = {int(token): number for number, ids in enumerate(whole) for token in ids}
    for packing in ("first_fit", "best_fit", "concatenate"):
        for row in epoch_of(whole, 10, packing):
            segments, tokens = row["segments"], row["tokens"][0]
            sees = np.asarray(Packed.of(jnp.asarray(segments)).mask)[0, 0]
            for i, j in itertools.product(range(10), range(10)):
                if segments[0, i] and sees[i, j]:
                    assert segments[0, j]
                    assert of[int(tokens[i])] == of[int(tokens[j])]
                    assert j <= i
                    assert row["positions"][0, i] - row["positions"][0, j] == i - j == tokens[i] - tokens[j]
            assert all(sees[i, i] for i in range(10) if segments[0, i])


def test_the_order_changes_from_epoch_to_epoch():
    rows = stream(pieces_of([9] * 16), 8, 16)
    first, second = next(rows), next(rows)
    assert sorted(first["tokens"].tolist()) == sorted(second["tokens"].tolist())
    assert not equal(first, second)


@pytest.mark.parametrize("packing", ["first_fit", "best_fit", "concatenate"])
def test_rows_are_a_function_of_the_seed_alone(packing):
    documents = pieces_of([9, 4, 5, 7, 3, 9, 2])

    def read(seed):
        return list(itertools.islice(stream(documents, 8, 2, packing, seed), 8))

    first = read(7)
    np.random.seed(1)  # whatever the program does with NumPy's own generator
    assert all(map(equal, first, read(7)))
    assert not all(map(equal, first, read(8)))


@settings(max_examples=12, deadline=None)
@given(
    lengths=st.lists(st.integers(9, 40), min_size=2, max_size=12), packing=packings, seed=st.integers(0, 9),
    data=st.data(),
)  # fmt: skip
def test_one_process_is_the_union_of_any_number_however_rows_lie(lengths, packing, seed, data):
    whole, batch = pieces_of(lengths), data.draw(st.integers(1, 8))
    owner = np.asarray(data.draw(st.lists(st.integers(0, 2), min_size=batch, max_size=batch)))
    everything = stream(whole, 8, batch, packing, seed)
    shares = [stream(whole, 8, batch, packing, seed, np.flatnonzero(owner == process)) for process in range(3)]
    for _ in range(6):
        expected, parts = next(everything), [next(share) for share in shares]
        assert len({tuple(share.get_state().items()) for share in [everything, *shares]}) == 1
        for name in NAMES:
            joined = np.empty_like(expected[name])
            for process, part in enumerate(parts):
                joined[owner == process] = part[name]
            np.testing.assert_array_equal(joined, expected[name])


class CountingCorpus(MemoryCorpus):
    read_tokens = 0

    def read(self, documents, starts, counts, faults):
        self.read_tokens += int(counts.sum())
        return super().read(documents, starts, counts, faults)


def test_a_process_reads_the_tokens_of_its_own_rows_only():
    read = []
    for mine in (np.arange(8), np.arange(2)):
        corpus = CountingCorpus(pieces_of([9] * 400))
        blocks = Mixture([corpus], [np.zeros(400, bool)], [1.0], 8, "first_fit", 0)
        rows = training_rows(blocks, 8, 8, mine)
        list(itertools.islice(rows, 20))
        read.append(corpus.read_tokens)
    assert read == [20 * 8 * 9, 20 * 2 * 9]


@pytest.mark.parametrize("packing", ["first_fit", "best_fit", "concatenate"])
def test_resumed_at_fifty_random_points_on_another_number_of_processes_nothing_is_lost_or_repeated(packing):
    draw = random.Random(3)
    whole = pieces_of([draw.randrange(2, 60) for _ in range(1000)])  # three blocks an epoch
    undisturbed = list(itertools.islice(stream(whole, 16, 4, packing, 5), 600))
    at, state = 0, stream(whole, 16, 4, packing, 5).get_state()
    for stop in [*sorted(draw.sample(range(1, 600), 50)), 600]:
        processes = draw.choice([1, 2, 4])
        shares = [stream(whole, 16, 4, packing, 5, np.arange(4)[process::processes]) for process in range(processes)]
        for share in shares:
            share.set_state(json.loads(json.dumps(state)))
        for expected in undisturbed[at:stop]:
            for process, share in enumerate(shares):
                part = next(share)
                for name in NAMES:
                    np.testing.assert_array_equal(part[name], expected[name][process::processes])
        states = [share.get_state() for share in shares]
        assert all(other == states[0] for other in states)
        at, state = stop, states[0]


def test_a_state_goes_back_as_well_as_on():
    rows = stream(pieces_of([9, 4, 5, 7, 3, 9, 2]), 8, 2)
    state = rows.get_state()
    expected = list(itertools.islice(rows, 9))
    rows.set_state(state)
    assert all(map(equal, expected, itertools.islice(rows, 9)))


def test_grains_own_checkpoint_test_passes():
    class FirstRows:
        """A few batches of the endless stream: that test wants them finite."""

        def __iter__(self):
            return Limited(iter(RowDataset(mixture(pieces_of([9, 4, 5, 7, 3, 9, 2]), 8), 8, 2, np.arange(2), "fail")))

    class Limited:
        def __init__(self, rows, done=0):
            self.rows, self.done = rows, done

        def __iter__(self):
            return self

        def __next__(self):
            if self.done == 9:
                raise StopIteration
            self.done += 1
            return next(self.rows)

        def get_state(self):
            return {"done": self.done, "rows": self.rows.get_state()}

        def set_state(self, state):
            self.done = state["done"]
            self.rows.set_state(state["rows"])

    grain.experimental.assert_equal_output_after_checkpoint(FirstRows())


def test_a_state_of_another_kind_is_bad_input():
    with pytest.raises(BadInput, match="a position that this version can't read"):
        stream(pieces_of([9, 9]), 8, 2).set_state({"parent": {"next_index": 3}})


@settings(max_examples=100, deadline=None)
@given(lengths=st.lists(st.integers(0, 40), max_size=6), length=st.integers(1, 12), rows=st.integers(1, 4))
def test_evaluation_scores_every_token_but_a_documents_first_once_from_half_a_sequence_at_least(lengths, length, rows):
    whole = pieces_of(lengths)
    start_of = {int(token): int(ids[0]) for ids in whole for token in ids}
    scored = []
    for batch in evaluation_rows(whole, length, rows):
        assert batch["tokens"].shape == (rows, length)
        pieces_in_order = zip(*(batch[name] for name in NAMES), batch["document"], strict=True)
        for tokens, targets, segments, positions, weights, document in pieces_in_order:
            assert set(weights.tolist()) <= {0.0, 1.0}
            assert not weights[segments == 0].any()
            np.testing.assert_array_equal(positions, np.arange(length))
            np.testing.assert_array_equal(targets[segments > 0], tokens[segments > 0] + 1)
            for column in np.flatnonzero(weights):
                target = int(targets[column])
                assert start_of[target] == start_of[int(tokens[0])] == whole[document][0]
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
