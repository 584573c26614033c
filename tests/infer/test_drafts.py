"""Guesses from a sequence's own past, against a search from the end."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from gshardx.infer.drafts import PromptLookup
from gshardx.infer.scheduler import Segment, Sequence


def searched(tokens, most, longest=4, shortest=2):
    """What followed the latest earlier occurrence of the last tokens."""
    for length in range(longest, shortest - 1, -1):
        if length > len(tokens):
            continue
        for end in range(len(tokens) - 1, length - 1, -1):
            if tokens[end - length : end] == tokens[len(tokens) - length :]:
                return tokens[end : end + most]
    return []


@given(
    st.lists(st.integers(0, 2), min_size=1, max_size=40), st.lists(st.integers(1, 6), max_size=12), st.integers(1, 5)
)
def test_what_followed_the_last_tokens_before(tokens, pieces, most):
    """However many tokens come at once."""
    sequence = Sequence(np.zeros(len(tokens) + 8, np.int32), 1, None, 0)
    sequence.tokens[: len(tokens)] = tokens
    lookup = PromptLookup()
    for piece in [*pieces, len(tokens)]:
        sequence.known = min(sequence.known + piece, len(tokens))
        expected = searched(tokens[: sequence.known], most)
        count = lookup.available(sequence, most)
        assert count == len(expected)
        if count:
            lookup.write([[Segment(sequence, sequence.known - 1, 1 + count, True, count)]])
            assert sequence.tokens[sequence.known :][:count].tolist() == expected
            sequence.tokens[: len(tokens)], sequence.tokens[len(tokens) :] = tokens, 0


def test_those_that_ended_are_forgotten():
    sequence, lookup = Sequence(np.zeros(8, np.int32), 1, None, 0, known=4), PromptLookup()
    assert lookup.available(sequence, 3) == 1
    lookup.forget(sequence)
    assert not lookup._indices
