"""Depth follows what was accepted and what calls cost."""

import numpy as np
import pytest

from gshardx.infer.depth import EXPLORE, Costs, Depth, expected_tokens
from gshardx.infer.scheduler import Sequence


def sequences(count):
    return [Sequence(np.zeros(8, np.int32), 1, None, 0) for _ in range(count)]


def depth_of(most=7, plain=1.0, base=1.0, each=0.0, draft=0.0):
    return Depth(most, Costs(lambda rows: plain, lambda tokens: base + each * tokens, lambda rows: draft))


def taught(depth, ones, chance, guesses=400):
    draw = np.random.default_rng(0)
    for one in ones:
        for _ in range(guesses):
            right = int((np.append(draw.random(4) < chance, False)).argmin())
            depth.learn(one, right, 4)
    return depth


@pytest.mark.parametrize("chance", [0.0, 0.3, 0.8, 1.0])
def test_tokens_of_a_check_against_counting(chance):
    hits = np.random.default_rng(1).random((200_000, 5)) < chance
    hits[:, 4] = False
    assert expected_tokens(chance, 4) == pytest.approx((hits.argmin(1) + 1).mean(), abs=0.02)


@pytest.mark.parametrize(
    ("chance", "costs", "expected"),
    [
        (0.95, {}, 7),  # a check costs what one token does: as deep as it goes
        (0.95, {"base": 0.1, "each": 1.0}, 0),  # each token costs its own: nothing to gain
        (0.0, {"each": 1e-3}, 0),
        (0.9, {"draft": 3.0}, 0),  # drafts cost more than tokens
        (0.7, {"each": 0.2}, None),  # somewhere between
    ],
)
def test_the_depth_that_is_fastest(chance, costs, expected):
    (one,) = sequences(1)
    depth = taught(depth_of(**costs), [one], chance)
    by_hand = [
        expected_tokens(depth._records[one].chance, d)
        / (depth.costs.check(1 + d) + d * depth.costs.draft(1) if d else depth.costs.plain(1))
        for d in range(8)
    ]
    best = int(np.argmax(by_hand))
    assert best == expected if expected is not None else 0 < best < 7
    assert depth.choose({one: 7}, 1) == ({one: best} if best else {})


def test_no_more_than_is_available_and_each_by_its_own_record():
    good, bad = sequences(2)
    depth = depth_of()
    taught(depth, [good], 1.0)
    taught(depth, [bad], 0.0)
    assert depth.choose({good: 3, bad: 7}, 2)[good] == 3


def test_off_is_tried_again_now_and_then():
    (one,) = sequences(1)
    depth = taught(depth_of(each=0.01), [one], 0.0)
    chosen = [depth.choose({one: 5}, 1) for _ in range(2 * EXPLORE)]
    assert [bool(c) for c in chosen].count(True) == 2
    assert chosen[EXPLORE - 1] == {one: 1}


def test_those_that_ended_are_forgotten():
    (one,) = sequences(1)
    depth = taught(depth_of(), [one], 0.5)
    depth.forget(one)
    assert not depth._records
