"""The SparseMixer router against loops, choice by choice, and what its gradient estimates."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings

from gshardx.layers.draws import draw, folded, row_keys
from gshardx.layers.routing import Capacity, SparseMixerRouter
from tests.layers.routing.cases import DRAWN, G, M, capacity_of, check, compiled, data
from tests.oracles import sparse_mixer as oracle

SETTINGS = {
    "phi": ((12, 8, 2), Capacity(None), {}),
    "wide": ((12, 8, 3), Capacity(1.0), {"jitter": 0.4}),
    "all near": ((13, 3, 3), Capacity(0.6, rounding="down"), {"jitter": 50.0, "priority": "gate"}),
    "one token": ((1, 3, 1), Capacity(0.01), {"jitter": 0.2}),
}


def draws(rng, k, s, e):
    """The router's, ``[g, k, s, e]`` and ``[g, k, s]``."""
    keys = row_keys(rng, G)
    own = [folded(keys, choice) for choice in range(k)]
    gumbel = [draw(jax.random.gumbel, folded(one, 0), (G, s, e)) for one in own]
    coin = [draw(jax.random.uniform, folded(one, 1), (G, s, 1))[..., 0] for one in own]
    return np.stack(gumbel, axis=1), np.stack(coin, axis=1)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", SETTINGS)
@settings(max_examples=12, deadline=None)
@given(**DRAWN)
def test_equals_the_loops_in_every_setting(name, training, seed, kind, padding):
    (s, e, k), capacity, options = SETTINGS[name]
    tokens, kernel, valid = data(seed, kind, s, e, padding=padding)
    rng = jax.random.key(seed) if training else None
    routing, logits = compiled(SparseMixerRouter, e, k, capacity=capacity, **options)(kernel, tokens, valid, rng)
    slots = capacity_of(capacity, s, e, k, training)
    gumbel, coin = draws(rng, k, s, e) if training else ([None] * G, [None] * G)
    groups = [
        oracle.route(np.asarray(logits[g]), k, slots, valid[g], gumbel=gumbel[g], coin=coin[g], **options)
        for g in range(G)
    ]
    assume(min(group.margin for group in groups) > 1e-5)
    assert routing.capacity == slots
    check(routing, groups)


def test_an_expert_with_none_near_it_weighs_one_and_two_that_are_near_share():
    tokens = np.broadcast_to(np.float32([1, 0, 0, 0]), (G, 3, M))
    kernel = np.zeros((M, 4), np.float32)
    kernel[0] = [1.0, 2.0, 1.99, -3.0]
    call = compiled(SparseMixerRouter, 4, 2, capacity=Capacity(None))
    routing = call(kernel, tokens, np.ones((G, 3), bool), None)[0]
    np.testing.assert_array_equal(routing.experts[0, 0], [1, 2])
    np.testing.assert_allclose(routing.weights[0, 0], [1 / (1 + np.exp(-0.01)), 1.0], rtol=1e-6)


def test_the_best_is_that_of_the_logits_where_their_gates_round_to_the_same():
    """1 and the next number below it: their softmax is half and half."""
    tokens = np.broadcast_to(np.float32([1, 0, 0, 0]), (G, 3, M))
    kernel = np.zeros((M, 3), np.float32)
    kernel[0] = [0.0, np.nextafter(np.float32(1), np.float32(0)), 1.0]
    call = compiled(SparseMixerRouter, 3, 1, capacity=Capacity(None))
    routing = call(kernel, tokens, np.ones((G, 3), bool), None)[0]
    assert (np.asarray(routing.experts) == 2).all()
    np.testing.assert_array_equal(routing.weights, 0.5)


def test_no_token_goes_to_an_expert_twice_even_where_its_scores_are_no_numbers():
    tokens, kernel, valid = data(0, "random", 12, 8)
    tokens[0, 0] = np.nan
    call = compiled(SparseMixerRouter, 8, 3, jitter=0.4, capacity=Capacity(None))
    for rng in (None, jax.random.key(0)):
        experts = np.sort(np.asarray(call(kernel, tokens, valid, rng)[0].experts), axis=-1)
        assert (np.diff(experts, axis=-1) > 0).all()


def test_noise_on_the_input_is_drawn_in_training_only():
    tokens, kernel, valid = data(1, "random", 12, 8)
    plain = compiled(SparseMixerRouter, 8, 2, capacity=Capacity(None))
    noisy = compiled(SparseMixerRouter, 8, 2, input_jitter=0.5, capacity=Capacity(None))
    for rng, same in ((None, True), (jax.random.key(0), False)):
        one, other = (call(kernel, tokens, valid, rng)[0].losses["z"] for call in (plain, noisy))
        assert (float(one) == float(other)) == same


def test_over_many_draws_the_gradient_is_that_of_the_draw():
    """Of a loss f that is cubic in the output, so that Heun's method is exact: of ``sum_i p_i f(p_i c_i)`` by the p_i
    in front. The likeliest expert, taken whole, has its slope there instead."""
    s, scores, outputs = 20_000, np.array([0.3, 0.0, -0.4]), np.array([1.0, -2.0, 1.5])

    def f(y):
        return y**3 - 0.5 * y**2 + 2 * y

    kernel = np.zeros((M, 3), np.float32)
    kernel[0] = scores
    tokens = np.broadcast_to(np.float32([1, 0, 0, 0]), (G, s, M))
    call = compiled(SparseMixerRouter, 3, 1, jitter=50.0, capacity=Capacity(None))

    def loss(kernel):
        routing = call(kernel, tokens, np.ones((G, s), bool), jax.random.key(0))[0]
        return f(routing.weights * jnp.asarray(outputs)[routing.experts]).sum(-1).mean()

    p = np.exp(scores) / np.exp(scores).sum()
    change = f(p * outputs) - f(0.0)
    change[0] = p[0] * outputs[0] * (3 * (p[0] * outputs[0]) ** 2 - p[0] * outputs[0] + 2)
    expected = change @ (np.diag(p) - np.outer(p, p))
    np.testing.assert_allclose(jax.grad(loss)(kernel)[0], expected, atol=0.01)
    assert np.abs(expected).max() > 0.3
