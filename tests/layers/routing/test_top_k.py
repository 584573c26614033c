"""The top-k router against loops, token by token, in the settings of public models."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings

from gshardx.layers.routing import Capacity, TopKRouter
from tests.layers.routing.cases import DRAWN, G, capacity_of, check, compiled, data
from tests.oracles import top_k as oracle

SETTINGS = {
    "mixtral": ((12, 8, 2), Capacity(None), {}),
    "olmoe": ((12, 8, 3), Capacity(1.0), {"renormalise": False}),
    "granite": ((13, 3, 2), Capacity(0.6), {"softmax": "after", "renormalise": False}),
    "gpt_oss": ((12, 8, 2), Capacity(0.5), {"softmax": "after", "bias": True}),
    "deepseek_v2": ((12, 8, 3), Capacity(None), {"renormalise": False, "scale": 16.0, "groups": 4, "groups_kept": 2}),
    "by_gate": ((12, 8, 2), Capacity(0.01), {"priority": "gate", "groups": 2, "groups_kept": 1, "scale": 2.5}),
    "one_token": ((1, 3, 3), Capacity(0.01, minimum=4), {"renormalise": False}),
}


@pytest.mark.parametrize("name", SETTINGS)
@settings(max_examples=15, deadline=None)
@given(**DRAWN)
def test_equals_the_loops_in_the_settings_of_public_models(name, seed, kind, padding):
    (s, e, k), capacity, options = SETTINGS[name]
    tokens, kernel, valid = data(seed, kind, s, e, padding=padding)
    given = {}
    if options.get("bias"):
        given["bias"] = np.random.default_rng(seed + 1).normal(size=e).astype(np.float32)
    routing, logits = compiled(TopKRouter, e, k, capacity=capacity, **options)(
        kernel, tokens, valid, jax.random.key(seed), **given
    )
    slots = capacity_of(capacity, s, e, k, training=True)
    settings_of_oracle = {name: value for name, value in options.items() if name != "bias"}
    groups = [oracle.route(np.asarray(logits[g]), k, slots, valid[g], **settings_of_oracle) for g in range(G)]
    assume(min(group.margin for group in groups) > 1e-6)
    assert routing.capacity == slots
    check(routing, groups, scale=options.get("scale", 1.0))


def test_the_logits_are_the_tokens_times_the_kernel_plus_the_bias():
    tokens, kernel, valid = data(0, "random", 12, 8)
    bias = np.random.default_rng(0).normal(size=8).astype(np.float32)
    _, _, options = SETTINGS["gpt_oss"]
    call = compiled(TopKRouter, 8, 2, capacity=SETTINGS["gpt_oss"][1], **options)
    expected = np.einsum("gsm,me->gse", tokens.astype(np.float64), kernel) + bias
    np.testing.assert_allclose(call(kernel, tokens, valid, jax.random.key(0), bias=bias)[1], expected, atol=1e-5)


def test_softmax_after_the_choice_equals_softmax_before_it_with_renormalisation():
    tokens, kernel, valid = data(1, "random", 12, 8)
    before = compiled(TopKRouter, 8, 2, capacity=Capacity(None))(kernel, tokens, valid, jax.random.key(0))[0]
    after = compiled(TopKRouter, 8, 2, softmax="after", capacity=Capacity(None))(
        kernel, tokens, valid, jax.random.key(0)
    )[0]
    np.testing.assert_array_equal(before.experts, after.experts)
    np.testing.assert_allclose(before.weights, after.weights, atol=1e-6)


def test_without_a_softmax_the_best_experts_weigh_what_scale_says():
    tokens, kernel, valid = data(1, "random", 12, 8)
    before = compiled(TopKRouter, 8, 2, capacity=Capacity(None))(kernel, tokens, valid, jax.random.key(0))[0]
    none = compiled(TopKRouter, 8, 2, softmax="none", scale=0.5, capacity=Capacity(None))(
        kernel, tokens, valid, jax.random.key(0)
    )[0]
    np.testing.assert_array_equal(before.experts, none.experts)
    np.testing.assert_array_equal(none.weights, 0.5 * np.asarray(none.keep))
    np.testing.assert_array_equal(before.keep, none.keep)


def test_tokens_stay_within_the_best_groups():
    tokens, kernel, valid = data(2, "random", 12, 8)
    _, capacity, options = SETTINGS["deepseek_v2"]
    routing, logits = compiled(TopKRouter, 8, 3, capacity=capacity, **options)(kernel, tokens, valid, jax.random.key(0))
    free = compiled(TopKRouter, 8, 3, capacity=capacity)(kernel, tokens, valid, jax.random.key(0))[0]
    groups = [len(set(row)) for row in (np.asarray(routing.experts) // 2).reshape(-1, 3)]
    assert max(groups) == 2
    assert max(len(set(row)) for row in (np.asarray(free.experts) // 2).reshape(-1, 3)) == 3
    np.testing.assert_array_equal(np.asarray(routing.experts)[..., 0], np.asarray(logits).argmax(-1))


@pytest.mark.parametrize("name", ["mixtral", "olmoe", "granite"])
def test_gradient_of_the_weights_is_that_of_the_formula_with_the_choice_held(name):
    (s, e, k), capacity, options = SETTINGS[name]
    tokens, kernel, valid = data(3, "random", s, e)
    call = compiled(TopKRouter, e, k, capacity=capacity, **options)
    routing = call(kernel, tokens, valid, jax.random.key(0))[0]
    target = np.random.default_rng(3).normal(size=(G, s, k)).astype(np.float32)

    def formula(kernel):
        logits = jnp.einsum("gsm,me->gse", tokens, kernel)
        chosen = jnp.take_along_axis(logits, routing.experts, axis=-1)
        total = logits if name == "olmoe" else chosen
        weights = jnp.exp(chosen) / jnp.exp(total).sum(-1, keepdims=True)
        return jnp.sum(target * weights * routing.keep)

    actual = jax.grad(lambda w: jnp.sum(target * call(w, tokens, valid, jax.random.key(0))[0].weights))(kernel)
    np.testing.assert_allclose(actual, jax.grad(formula)(kernel), atol=2e-6)
    assert np.abs(actual).max() > 0.01


@pytest.mark.parametrize("k", [2, 3])
def test_a_collapsed_router_costs_the_number_of_experts_over_k(k):
    tokens = np.broadcast_to(np.float32([1, 0, 0, 0]), (G, 12, 4))
    kernel = np.zeros((4, 8), np.float32)
    kernel[0, :k] = 50
    routing = compiled(TopKRouter, 8, k, capacity=Capacity(1.0))(
        kernel, tokens, np.ones((G, 12), bool), jax.random.key(0)
    )[0]
    assert float(routing.losses["balance"]) == pytest.approx(8 / k, abs=1e-5)
