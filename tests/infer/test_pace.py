"""Short calls where one waits for them, long ones where nobody does."""

import pytest

from gshardx.infer.pace import LEARNT, Pace


def taught(ahead_ms, ms, calls=50):
    pace = Pace(ahead_ms)
    for _ in range(calls):
        pace.learn("decode", 4, 4 * ms / 1e3)
    return pace


@pytest.mark.parametrize(
    ("ms", "steps", "two_at_once"),
    [(0.5, 8, True), (3.0, 6, False), (9.0, 2, False), (15.0, 1, False), (30.0, 1, False)],
)
def test_two_calls_fill_the_time_that_is_given(ms, steps, two_at_once):
    pace = taught(40.0, ms)
    assert pace.steps("decode", 8) == steps
    assert pace.steps("decode", 8) * ms <= 20 or steps == 1
    assert pace.enough([("decode", steps)] * 2) is not two_at_once


def test_a_call_that_is_too_long_is_waited_for():
    assert taught(40.0, 30.0).enough([("decode", 1)])
    assert not taught(40.0, 15.0).enough([("decode", 1)])
    assert not taught(40.0, 30.0).enough([])


def test_what_was_never_timed_is_tried_alone():
    pace = Pace(40.0)
    assert pace.steps("decode", 8) == 1
    assert not pace.enough([("decode", 1)])


def test_without_a_bound_all_is_done_at_once():
    pace = taught(None, 1000.0)
    assert pace.steps("decode", 8) == 8
    assert not pace.enough([("decode", 8)])


def test_the_newest_calls_count_most():
    pace = taught(40.0, 1.0)
    pace.learn("decode", 1, 0.011)
    assert pace.steps("decode", 99) == int(20 / (1 + LEARNT * 10))
