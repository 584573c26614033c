"""Distances, integers' against Python's own arithmetic."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gshardx.checkpoint.compare import distances


@pytest.mark.parametrize("dtype", [np.bool_, np.int8, np.uint32, np.int64, np.uint64])
@given(st.data())
def test_integers_are_told_apart_exactly(dtype, data):
    low, high = (0, 1) if dtype is np.bool_ else (np.iinfo(dtype).min, np.iinfo(dtype).max)
    pairs = data.draw(st.lists(st.tuples(st.integers(low, high), st.integers(low, high)), min_size=1, max_size=9))
    check_distances([(int(a), int(b)) for a, b in pairs], dtype, dtype)


@given(st.lists(st.tuples(st.integers(0, 2**63 - 1), st.integers(0, 2**64 - 1)), min_size=1, max_size=9))
@example([(2**63 - 1, 2**63), (2**53 + 1, 2**53), (5, 5)])
def test_of_other_types_too(pairs):
    check_distances(pairs, np.int64, np.uint64)


def check_distances(pairs, dtype, other):
    a, b = (np.asarray(values, kind) for values, kind in zip(zip(*pairs, strict=True), (dtype, other), strict=True))
    assert distances(a, b).tolist() == [float(abs(x - y)) for x, y in pairs if x != y]


@pytest.mark.parametrize("shape", [(), (1,), (2, 3)])
def test_neighbours_beyond_what_float64_holds_differ(shape):
    one = np.full(shape, 2**60, np.int64)
    assert (distances(one, one + 1) == np.ones(one.size)).all()
    assert distances(one, one + 1).size == one.size
    assert distances(one, one).size == 0


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_what_is_not_finite_is_infinitely_far_and_nan_equals_nan(dtype):
    one, other = np.asarray([1, np.nan, np.nan, np.inf, np.inf, 4], dtype), np.asarray([1, np.nan, 0, np.inf, 0, 2])
    assert distances(one, other.astype(dtype)).tolist() == [np.inf, np.inf, 2]
