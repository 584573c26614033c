"""Thinning keeps what matters; smoothing and means pass over what is not finite."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gshardx.report.read import NOTHING, Series
from gshardx.report.series import recent, smooth, thin, window

NUMBERS = st.lists(st.floats(-1e30, 1e30) | st.just(float("nan")), min_size=1, max_size=400)


def series(values):
    return Series(np.arange(len(values)) * 10, np.array(values, np.float64))


@given(NUMBERS, st.integers(4, 60))
def test_thin_keeps_the_extremes_the_ends_and_the_order(values, limit):
    full = series(values)
    thinned = thin(full, limit)
    assert len(thinned.steps) <= limit
    assert (np.diff(thinned.steps) > 0).all()
    np.testing.assert_array_equal(full.values[thinned.steps // 10], thinned.values)
    assert thinned.steps[0] == 0
    assert thinned.steps[-1] == full.steps[-1]
    if len(full.finite.values):
        assert thinned.finite.values.min() == full.finite.values.min()
        assert thinned.finite.values.max() == full.finite.values.max()


@given(NUMBERS, st.integers(4, 60), st.data())
def test_thin_keeps_a_spike_wherever_it_is(values, limit, data):
    place = data.draw(st.integers(0, len(values) - 1))
    values[place] = 1e31
    thinned = thin(series(values), limit)
    assert thinned.values[thinned.steps == place * 10].tolist() == [1e31]


def test_a_long_stretch_without_numbers_stays_a_gap():
    values = np.ones(1000)
    values[400:600] = np.nan
    thinned = thin(series(values), 50)
    inside = (thinned.steps >= 4000) & (thinned.steps < 6000)
    assert inside.any()
    assert np.isnan(thinned.values[inside]).all()
    assert np.isfinite(thinned.values[~inside]).all()


@given(NUMBERS, st.integers(2, 20))
def test_smooth_is_the_mean_of_the_finite_neighbours(values, width):
    values = [value if abs(value) < 1e3 else float("nan") for value in values]
    got = smooth(series(values), width).values
    wide = min(width, len(values))
    for place in range(len(values)):
        first = place - wide // 2
        near = [value for value in values[max(0, first) : first + wide] if np.isfinite(value)]
        if near:
            assert got[place] == pytest.approx(np.mean(near), abs=1e-6)
        else:
            assert np.isnan(got[place])


def test_windows_grow_with_the_run_up_to_a_bound():
    assert [window(count) for count in (0, 40, 1000, 1_000_000)] == [0, 0, 20, 500]
    short = series([1.0, 2.0])
    assert smooth(short, window(2)) is short


def test_recent_is_the_mean_of_the_last_tenth():
    assert recent(series([5.0] * 90 + [1.0] * 10)) == 1.0
    assert recent(series([9.0, 1.0, np.nan])) == 5.0
    assert recent(NOTHING) is None
