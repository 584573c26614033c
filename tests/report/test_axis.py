"""Axes hold every value, and their ticks are round, few and inside."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gshardx.report.axis import Axis, fit, round_step


@given(st.lists(st.floats(-1e9, 1e9), min_size=1, max_size=20), st.sampled_from([None, 0.0, 1.0]), st.booleans())
def test_every_value_has_a_place_and_there_are_ticks(values, floor, logarithmic):
    axis = fit([np.array(values)], floor, logarithmic)
    places = axis.place(np.array(values))
    assert (places >= 0).all()
    assert (places <= 1).all()
    ticks = axis.ticks(3)
    assert all(-1e-6 <= place <= 1 + 1e-6 for place, _ in ticks)
    if not axis.logarithmic:
        assert 2 <= len(ticks) <= 9


@pytest.mark.parametrize(
    ("low", "high", "labels"),
    [
        (0, 40, ["0", "10", "20", "30", "40"]),
        (0, 2000, ["0", "500", "1k", "1.5k", "2k"]),
        (0, 1_000_000, ["0", "200k", "400k", "600k", "800k", "1M"]),
        (0.9, 1.6, ["1.0", "1.2", "1.4", "1.6"]),
        (0, 3e-5, ["0", "1e-5", "2e-5", "3e-5"]),
        (-0.2, 0.2, ["-0.2", "-0.1", "0", "0.1", "0.2"]),
    ],
)
def test_ticks_are_round(low, high, labels):
    assert [label for _, label in Axis(low, high).ticks(3)] == labels


def test_a_logarithmic_axis_is_for_wide_positive_ranges_only():
    assert fit([np.array([0.1, 90.0])], None, True).logarithmic
    assert not fit([np.array([0.1, 90.0])], None, False).logarithmic
    assert not fit([np.array([0.0, 90.0])], None, True).logarithmic
    assert not fit([np.array([2.0, 9.0])], None, True).logarithmic
    labels = [label for _, label in fit([np.array([0.1, 90.0])], None, True).ticks(3)]
    assert {"1", "10"} <= set(labels)


def test_no_values_make_no_axis():
    assert fit([np.array([np.nan])], None, False) is None
    assert fit([], None, False) is None


@given(st.floats(1e-12, 1e12))
def test_round_steps_are_at_most_what_was_asked_and_more_than_two_fifths_of_it(step):
    assert step * 0.399 < round_step(step) <= step * 1.00001
