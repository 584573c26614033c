"""Skywork-MoE's router against loops, and what normalised logits promise."""

import jax
import numpy as np
import pytest
from hypothesis import assume, given, settings

from gshardx.layers.routing import Capacity, SkyworkRouter
from tests.layers.routing.cases import DRAWN, G, capacity_of, check, compiled, data
from tests.oracles import skywork
from tests.oracles import top_k as oracle

SETTINGS = {
    "skywork": ((12, 8, 2), Capacity(None), {}),
    "sharp, tight": ((13, 3, 2), Capacity(0.6), {"spread": 3.0, "renormalise": False}),
    "one token": ((1, 3, 3), Capacity(0.01, minimum=4), {"spread": 0.5, "priority": "gate"}),
}


@pytest.mark.parametrize("name", SETTINGS)
@settings(max_examples=12, deadline=None)
@given(**DRAWN)
def test_equals_the_loops_in_every_setting(name, seed, kind, padding):
    (s, e, k), capacity, options = SETTINGS[name]
    tokens, kernel, valid = data(seed, kind, s, e, padding=padding)
    routing, _ = compiled(SkyworkRouter, e, k, capacity=capacity, **options)(kernel, tokens, valid, jax.random.key(0))
    theirs = {name: value for name, value in options.items() if name != "spread"}
    plain = np.einsum("gsm,me->gse", tokens.astype(np.float64), kernel)
    logits = [skywork.normalised(plain[g], options.get("spread", 1.0)) for g in range(G)]
    slots = capacity_of(capacity, s, e, k, training=True)
    groups = [oracle.route(logits[g], k, slots, valid[g], **theirs) for g in range(G)]
    assume(min(group.margin for group in groups) > 1e-5)
    assert routing.capacity == slots
    check(routing, groups, scale=options.get("spread", 1.0))


@pytest.mark.parametrize("spread", [1.0, 2.5])
def test_gates_are_as_sharp_however_small_the_kernel_is(spread):
    tokens, kernel, valid = data(1, "random", 12, 8)
    call = compiled(SkyworkRouter, 8, 2, spread=spread, capacity=Capacity(None))
    large, small = (call(scale * kernel, tokens, valid, None) for scale in (1.0, 1e-3))
    np.testing.assert_array_equal(large[0].experts, small[0].experts)
    np.testing.assert_allclose(large[0].weights, small[0].weights, atol=1e-5)
    np.testing.assert_allclose(np.asarray(large[1]).mean(-1), 0.0, atol=1e-6)
    np.testing.assert_allclose(np.asarray(large[1]).std(-1), spread, rtol=1e-5)


def test_equal_logits_have_even_gates_and_finite_gradients():
    tokens, kernel, valid = data(1, "ties", 12, 8)
    call = compiled(SkyworkRouter, 8, 2, capacity=Capacity(None))
    gradient = jax.grad(lambda w: call(w, tokens, valid, None)[0].losses["balance"])(kernel)
    assert np.isfinite(gradient).all()
    np.testing.assert_array_equal(call(kernel, tokens, valid, None)[1], 0.0)
