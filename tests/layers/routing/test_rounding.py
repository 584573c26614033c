"""Token rounding against loops, and that every expert's tokens fill whole tiles."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings

from gshardx.errors import BadInput
from gshardx.layers.routing import Capacity, SkyworkRouter, TopKRouter
from tests.layers.routing.cases import DRAWN, G, check, compiled, data
from tests.oracles import rounding as oracle

SETTINGS = {
    "pairs": ((13, 4, 2), Capacity(None), {"round_to": 2}),
    "tight": ((16, 5, 3), Capacity(0.5), {"round_to": 3, "renormalise": False, "scale": 2.5}),
    "after": ((16, 4, 2), Capacity(None), {"round_to": 4, "softmax": "after"}),
    "in groups": ((16, 8, 3), Capacity(None), {"round_to": 3, "groups": 4, "groups_kept": 2, "softmax": "none"}),
}


@pytest.mark.parametrize("name", SETTINGS)
@settings(max_examples=12, deadline=None)
@given(**DRAWN)
def test_equals_the_loops_and_fills_whole_tiles(name, seed, kind, padding):
    (s, e, k), capacity, options = SETTINGS[name]
    tokens, kernel, valid = data(seed, kind, s, e, padding=padding)
    routing, logits = compiled(TopKRouter, e, k, capacity=capacity, **options)(kernel, tokens, valid, jax.random.key(0))
    tile = options["round_to"]
    theirs = {name: value for name, value in options.items() if name != "round_to"}
    slots = s if capacity.factor is None else 6  # 0.5 * 3 * 16 / 5 = 4.8 slots, in tiles of three
    groups = [oracle.route(np.asarray(logits[g]), k, slots, valid[g], tile, **theirs) for g in range(G)]
    assume(min(group.margin for group in groups) > 1e-6)
    assert routing.capacity == slots
    check(routing, groups, scale=options.get("scale", 1.0))
    total = 0
    for g in range(G):
        experts = np.asarray(routing.experts[g])
        load, kept = (np.bincount(experts[x], minlength=e) for x in (groups[g].wanted, np.asarray(routing.keep[g])))
        assert (load % tile == 0).all()
        assert (kept % tile == 0).all()
        assert (np.abs(load - np.bincount(experts[valid[g], :k].ravel(), minlength=e)) < tile).all()
        total += load
    np.testing.assert_array_equal(routing.stats.load, total)


def test_equal_gates_are_taken_in_order_of_tokens():
    """All tokens are alike and choose experts 0 and 1: 14 of 15 stay, and nobody joins experts that none chose."""
    tokens, kernel, valid = data(0, "ties", 15, 4)
    call = compiled(TopKRouter, 4, 2, round_to=7, capacity=Capacity(None))
    routing, _ = call(kernel, tokens, valid, jax.random.key(0))
    first = np.asarray(routing.keep)[..., :2]
    np.testing.assert_array_equal(first, np.broadcast_to(np.arange(15)[:, None] < 14, first.shape))
    assert not np.asarray(routing.keep)[..., 2:].any()
    np.testing.assert_array_equal(routing.stats.load, [28, 28, 0, 0])


@pytest.mark.parametrize("make", [TopKRouter, SkyworkRouter])
def test_inference_is_plain_and_so_is_a_tile_of_one(make):
    tokens, kernel, valid = data(1, "random", 16, 4, padding="some")
    plain, rounds, ones = (compiled(make, 4, 2, capacity=Capacity(0.8), round_to=tile) for tile in (1, 4, 1))
    for rng, other in ((None, rounds), (jax.random.key(0), ones)):
        first, second = (call(kernel, tokens, valid, rng)[0] for call in (plain, other))
        jax.tree.map(np.testing.assert_array_equal, first, second)
    assert rounds(kernel, tokens, valid, jax.random.key(0))[0].experts.shape[-1] == 4


def test_choices_that_stay_weigh_what_they_did_and_gradients_are_finite():
    tokens, kernel, valid = data(2, "random", 16, 4)
    one, four = (compiled(TopKRouter, 4, 2, capacity=Capacity(None), round_to=tile) for tile in (1, 4))
    plain, rounds = (call(kernel, tokens, valid, jax.random.key(0))[0] for call in (one, four))
    stay = np.asarray(rounds.keep)[..., :2]
    assert 0.5 < stay.mean() < 1
    np.testing.assert_allclose(np.asarray(rounds.weights)[..., :2][stay], np.asarray(plain.weights)[stay], atol=1e-6)
    added = np.asarray(rounds.keep)[..., 2:]
    assert added.any()
    assert (np.asarray(rounds.weights)[..., 2:][added] > 0).all()
    gradient = jax.grad(lambda w: jnp.sum(four(w, tokens, valid, jax.random.key(0))[0].weights ** 2))(kernel)
    assert np.isfinite(gradient).all()
    assert float(rounds.losses["balance"]) == pytest.approx(float(plain.losses["balance"]), rel=1e-6)


def test_tiles_that_most_experts_do_not_fill_are_refused():
    tokens, kernel, valid = data(3, "random", 16, 4)
    call = compiled(TopKRouter, 4, 2, round_to=9)
    with pytest.raises(BadInput, match=r"round_to = 9: of a group of 16 tokens an expert has 8 .*use 8 or less"):
        call(kernel, tokens, valid, jax.random.key(0))
    call(kernel, tokens, valid, None)
    with pytest.raises(BadInput, match=r"round_to = 0: must be 1 or more"):
        compiled(TopKRouter, 4, 2, round_to=0)
