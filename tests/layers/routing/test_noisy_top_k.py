"""Noisy top-k gating against loops, and what its losses are of."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings

from gshardx.config import ModelConfig, MoEConfig
from gshardx.errors import BadInput
from gshardx.layers.draws import draw
from gshardx.layers.losses import ImportanceLoss
from gshardx.layers.routing import Capacity, NoisyTopKRouter
from gshardx.models.decoder import check_model
from tests.layers.routing.cases import DRAWN, G, capacity_of, check, compiled, data
from tests.oracles import noisy_top_k as oracle

SETTINGS = {
    "two of eight": ((12, 8, 2), Capacity(1.0)),
    "all of three": ((13, 3, 3), Capacity(None)),
    "one token": ((1, 4, 1), Capacity(0.01)),
}
LOSSES = {**NoisyTopKRouter.LOSSES, "importance": ImportanceLoss()}


def routed(name, seed, kind, padding, training=True):
    """The router's, the oracle's groups, and the oracle's losses over the batch."""
    (s, e, k), capacity = SETTINGS[name]
    tokens, kernel, valid = data(seed, kind, s, e, padding=padding)
    noise = np.random.default_rng(seed + 1).normal(size=kernel.shape).astype(np.float32)
    rng = jax.random.key(seed) if training else None
    call = compiled(NoisyTopKRouter, e, k, capacity=capacity, losses=Frozen(LOSSES))
    routing, logits = call(kernel, tokens, valid, rng, noise=noise)
    drawn = np.asarray(draw(jax.random.normal, rng, (G, s, e))) if training else [None] * G
    scale = np.einsum("gsm,me->gse", tokens.astype(np.float64), noise)
    slots = capacity_of(capacity, s, e, k, training)
    found = [
        oracle.route(np.asarray(logits[g], np.float64), k, slots, valid[g], noise=drawn[g], scale=scale[g])
        for g in range(G)
    ]
    groups, gates, chances = zip(*found, strict=True)
    return routing, groups, {"importance": oracle.cv_squared(gates, valid), "load": oracle.cv_squared(chances, valid)}


class Frozen(dict):
    """A mapping that a cache can key by."""

    def __hash__(self):
        return hash(tuple(self))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", SETTINGS)
@settings(max_examples=10, deadline=None)
@given(**DRAWN)
def test_equals_the_loops_in_every_setting(name, training, seed, kind, padding):
    routing, groups, over_batch = routed(name, seed, kind, padding, training)
    assume(min(group.margin for group in groups) > 1e-5)
    for loss, expected in over_batch.items():
        np.testing.assert_allclose(routing.losses[loss], expected, atol=1e-4, rtol=1e-4)
    for loss in over_batch:
        del routing.losses[loss]
    check(routing, groups)


def test_without_an_rng_nothing_is_drawn_and_every_chance_is_one():
    routing = routed("two of eight", 0, "random", "none", training=False)[0]
    assert float(routing.losses["load"]) == 0.0
    again = routed("two of eight", 0, "random", "none", training=False)[0]
    np.testing.assert_array_equal(routing.weights, again.weights)


def test_the_load_has_a_gradient_that_spreads_tokens():
    """Of a kernel that sends every token to the last expert: following it lessens that expert's lead."""
    tokens, kernel, valid = data(2, "one expert", 12, 4)
    kernel *= 0.2
    call = compiled(NoisyTopKRouter, 4, 1, capacity=Capacity(None))

    def load(kernel):
        return call(kernel, tokens, valid, jax.random.key(0))[0].losses["load"]

    step = kernel - 0.1 * jax.grad(load)(kernel)
    lead = [np.diff(np.sort((tokens @ w).mean((0, 1))))[-1] for w in (kernel, np.asarray(step))]
    assert lead[1] < lead[0]
    assert float(load(step)) < float(load(jnp.asarray(kernel)))


def test_the_loss_of_load_needs_a_router_that_draws():
    config = ModelConfig(moe=MoEConfig(losses={"load": 0.1}))
    with pytest.raises(BadInput, match=r"model\.moe\.losses\.load is no loss of this router; use .* noisy_top_k"):
        check_model(config)
    check_model(dataclasses.replace(config, moe=dataclasses.replace(config.moe, router="noisy_top_k")))
