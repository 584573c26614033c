"""Numbers as a page shows them."""

import pytest

from gshardx.report.text import DASH, duration, moment, percent, short


@pytest.mark.parametrize(
    ("value", "said"),
    [(0, "0"), (0.01234, "0.0123"), (1234567, "1.23M"), (999_999, "1M"), (1e-7, "1e-7"), (None, DASH),
     (float("inf"), DASH), (1e40, "1e40"), (-2500, "-2.5k"), (128.0, "128")],
)  # fmt: skip
def test_short(value, said):
    assert short(value) == said


@pytest.mark.parametrize(
    ("share", "said"),
    [(0, "0%"), (1, "100%"), (0.9999, "> 99.9%"), (0.00001, "< 0.1%"), (0.0734, "7.3%"), (None, DASH)],
)
def test_percent(share, said):
    assert percent(share) == said


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (0.04, "0.0 s"),
        (9.96, "10 s"),
        (59.6, "1 min 00 s"),
        (61, "1 min 01 s"),
        (3600, "1 h 00 min"),
        (400_000, "111 h 06 min"),
    ],
)
def test_duration(seconds, said):
    assert duration(seconds) == said


def test_a_moment_that_no_clock_shows_is_empty():
    assert moment(0) == "1970-01-01 00:00:00"
    assert moment(None) == moment(-1) == moment(1e300) == ""
