"""Rotary positions: turned pairs against complex numbers, and what stretching does to slow and fast ones."""

import math

import numpy as np
import pytest

from gshardx.errors import BadInput
from gshardx.layers import Rope
from gshardx.layers.rope import rotate

HEAD_DIM, LENGTH = 64, 4096
STRETCHED = {
    "llama3": Rope(scaling="llama3", factor=8.0, original_length=LENGTH, low=1.0, high=4.0),
    "yarn": Rope(scaling="yarn", factor=8.0, original_length=LENGTH),
    "yarn, exact bounds": Rope(scaling="yarn", factor=8.0, original_length=LENGTH, truncate=False),
}


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("rope", [Rope(), Rope(width=4), Rope(scaling="linear", factor=2.0, magnitude=1.5)])
def test_a_pair_is_a_complex_number_that_turns(rope, interleaved):
    rope = Rope(**{**vars(rope), "interleaved": interleaved})
    x = np.random.default_rng(0).normal(size=(2, 3, 4, 8)).astype(np.float32)
    positions = np.array([[0, 1, 2], [5, 6, 900]])
    width = rope.width or 8
    pairs = x[..., :width].reshape(2, 3, 4, -1, 2) if interleaved else np.stack(np.split(x[..., :width], 2, -1), -1)
    speed = np.array([10_000.0 ** (-2 * i / width) for i in range(width // 2)]) / rope.factor
    turned = (pairs[..., 0] + 1j * pairs[..., 1]) * rope.scale * np.exp(1j * positions[..., None, None] * speed)
    both = np.stack([turned.real, turned.imag], -1)
    both = both.reshape(2, 3, 4, -1) if interleaved else np.concatenate([both[..., 0], both[..., 1]], -1)
    expected = np.concatenate([both, x[..., width:]], -1)
    np.testing.assert_allclose(rotate(x, positions, rope), expected, atol=2e-4)


@pytest.mark.parametrize("rope", STRETCHED.values(), ids=STRETCHED)
def test_fast_pairs_keep_their_speed_and_slow_ones_are_stretched(rope):
    plain, found = Rope().frequencies(HEAD_DIM), rope.frequencies(HEAD_DIM)
    turns = LENGTH * plain / (2 * math.pi)
    np.testing.assert_allclose(found[turns > rope.high * 1.4], plain[turns > rope.high * 1.4])
    np.testing.assert_allclose(found[turns < rope.low / 1.4], plain[turns < rope.low / 1.4] / rope.factor, rtol=1e-6)
    ratio = found / plain
    assert (np.diff(ratio) <= 1e-6).all()
    assert ((ratio > 1 / rope.factor + 1e-3) & (ratio < 1 - 1e-3)).any(), "some are in between"


def test_equal_bounds_of_llama3_leave_nothing_in_between():
    found = Rope(scaling="llama3", factor=16.0, original_length=LENGTH, low=1.0, high=1.0).frequencies(HEAD_DIM)
    plain = Rope().frequencies(HEAD_DIM)
    stretched = LENGTH * plain / (2 * math.pi) < 1
    assert 0 < stretched.sum() < len(plain)
    np.testing.assert_allclose(found, np.where(stretched, plain / 16, plain), rtol=1e-6)


def test_yarn_makes_what_turns_larger():
    assert STRETCHED["yarn"].scale == pytest.approx(0.1 * math.log(8) + 1)
    assert Rope(scaling="yarn", factor=8.0, original_length=64, magnitude=1.0).scale == 1.0


def test_longrope_divides_each_pair_by_its_own_factor():
    factors = [1.0, 2.0, 4.0, 8.0]
    found = Rope(scaling="longrope", factors=factors).frequencies(8)
    np.testing.assert_allclose(found * factors, Rope().frequencies(8), rtol=1e-6)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"width": 3}, "width = 3: .* use 4"),
        ({"width": 10}, "width = 10 is more than the head's 8; use 8"),
        ({"scaling": "yarn", "factor": 4.0}, "original_length = 0: yarn needs it"),
        ({"scaling": "linear", "factor": 0.5}, "factor = 0.5: must be 1 or more"),
        ({"scaling": "longrope"}, "factors = None are of scaling longrope"),
        ({"factors": [1.0]}, "factors = .* of scaling longrope, one a pair; scaling = none"),
        ({"scaling": "longrope", "factors": [1.0]}, "factors: 1 of them; 8 entries that turn need 4"),
        ({"low": 4.0, "high": 1.0}, "low below high"),
    ],
)
def test_what_can_not_be_is_said(options, said):
    with pytest.raises(BadInput, match=said):
        Rope(**options).frequencies(8)
