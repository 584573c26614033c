"""The sigmoid router with a balancing bias against DeepSeek-V3's loops, token by token and step by step."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import assume, given, settings

from gshardx.layers.routing import Capacity, SigmoidBiasRouter
from gshardx.layers.routing.sigmoid_bias import BiasState, bias_update
from tests.layers.routing.cases import DRAWN, G, M, capacity_of, check, compiled, data
from tests.oracles import sigmoid_bias as oracle

SETTINGS = {
    "deepseek_v3": ((12, 8, 3), Capacity(None), {"groups": 4, "groups_kept": 2, "scale": 2.5}),
    "tight": ((12, 8, 2), Capacity(0.5, rounding="down"), {"priority": "gate"}),
    "raw": ((13, 3, 2), Capacity(0.7), {"renormalise": False}),
    "llama_4": ((12, 8, 1), Capacity(1.0), {"renormalise": False, "weigh": "input", "rate": 0.0}),
    "one_token": ((1, 3, 2), Capacity(0.01), {"weigh": "input"}),
}


def state_of(seed, e, kind):
    """A bias of the size of the differences between scores, at times below zero throughout, and a load from before."""
    draw = np.random.default_rng(seed)
    bias = 0 if kind == "ties" and seed % 2 else draw.normal(size=e) / 4 - 2 * (seed % 3 == 0)
    return BiasState(jnp.full(e, bias, jnp.float32), jnp.asarray(draw.integers(0, 9, e), jnp.float32))


@pytest.mark.parametrize("name", SETTINGS)
@settings(max_examples=15, deadline=None)
@given(**DRAWN)
def test_equals_deepseeks_loops_in_every_setting(name, seed, kind, padding):
    (s, e, k), capacity, options = SETTINGS[name]
    tokens, kernel, valid = data(seed, kind, s, e, padding=padding)
    state = state_of(seed, e, kind)
    routing, logits = compiled(SigmoidBiasRouter, e, k, capacity=capacity, **options)(
        kernel, tokens, valid, jax.random.key(seed), state
    )
    slots = capacity_of(capacity, s, e, k, training=True)
    formula = {name: value for name, value in options.items() if name not in ("weigh", "rate")}
    both = [
        oracle.route(np.asarray(logits[g]), k, slots, valid[g], np.asarray(state.bias), **formula) for g in range(G)
    ]
    groups = [group for group, _ in both]
    assume(min(group.margin for group in groups) > 1e-6)
    assert routing.capacity == slots
    if options.get("weigh") == "input":
        np.testing.assert_array_equal(routing.weights, np.stack([group.keep for group in groups]))
        expected = np.stack([group.weights for group in groups])
        np.testing.assert_allclose(routing.input_weights, expected, atol=1e-6)
        groups = [group._replace(weights=group.keep) for group in groups]
    else:
        assert routing.input_weights is None
    check(routing, groups, scale=options.get("scale", 1.0))
    np.testing.assert_array_equal(routing.state.bias, state.bias)
    np.testing.assert_array_equal(routing.state.load, state.load + sum(np.asarray(load) for _, load in both))


def test_the_bias_changes_the_choice_but_no_weight_depends_on_it():
    tokens, kernel, valid = data(0, "random", 12, 8)
    call = compiled(SigmoidBiasRouter, 8, 2, renormalise=False, capacity=Capacity(None))
    lift = BiasState(jnp.zeros(8).at[5].set(2.0), jnp.zeros(8))
    plain, logits = call(kernel, tokens, valid, None, BiasState(jnp.zeros(8), jnp.zeros(8)))
    lifted = call(kernel, tokens, valid, None, lift)[0]
    assert (np.asarray(lifted.experts)[..., 0] == 5).all()
    assert not (np.asarray(plain.experts)[..., 0] == 5).all()
    scores = 1 / (1 + np.exp(-np.asarray(logits, np.float64)))
    expected = np.take_along_axis(scores, np.asarray(lifted.experts), axis=-1)
    np.testing.assert_allclose(lifted.weights, expected, atol=1e-6)


def test_of_logits_with_the_same_sigmoid_the_larger_is_chosen_if_asked_for():
    tokens, kernel, valid = data(0, "random", 12, 8)
    state = BiasState(jnp.zeros(8), jnp.zeros(8))
    for choose_by, all_best in (("logits", True), ("scores", False)):
        call = compiled(SigmoidBiasRouter, 8, 1, renormalise=False, choose_by=choose_by, capacity=Capacity(None))
        routing, logits = call(kernel, 500 * tokens, valid, None, state)
        assert (np.asarray(routing.experts)[..., 0] == np.asarray(logits).argmax(-1)).all() == all_best
        np.testing.assert_allclose(routing.weights[..., 0], 1.0 * valid, atol=1e-3)


def test_no_gradient_reaches_the_bias_and_the_scores_get_theirs():
    tokens, kernel, valid = data(1, "random", 12, 8)
    call = compiled(SigmoidBiasRouter, 8, 3, groups=4, groups_kept=2, scale=2.5, capacity=Capacity(None))
    state = state_of(1, 8, "random")
    target = np.random.default_rng(1).normal(size=(G, 12, 3)).astype(np.float32)
    experts = call(kernel, tokens, valid, None, state)[0].experts

    def loss(kernel, bias):
        routing = call(kernel, tokens, valid, None, BiasState(bias, state.load))[0]
        return jnp.sum(target * routing.weights) + routing.losses["balance"] + routing.losses["z"], routing.weights

    def weights(kernel):
        chosen = jax.nn.sigmoid(jnp.take_along_axis(jnp.einsum("gsm,me->gse", tokens, kernel), experts, axis=-1))
        return jnp.sum(target * 2.5 * chosen / chosen.sum(-1, keepdims=True))

    of_bias = jax.grad(loss, argnums=1, has_aux=True)(kernel, state.bias)[0]
    np.testing.assert_array_equal(of_bias, 0.0)
    of_kernel = jax.grad(lambda w: jnp.sum(target * loss(w, state.bias)[1]))(kernel)
    np.testing.assert_allclose(of_kernel, jax.grad(weights)(kernel), atol=1e-5)
    assert np.abs(of_kernel).max() > 0.01


def test_a_step_moves_the_bias_against_the_load_and_forgets_it():
    router = SigmoidBiasRouter(M, 4, 2, rate=0.25, rngs=nnx.Rngs(0))
    start = router.initial_state()
    np.testing.assert_array_equal(start.bias, np.zeros(4))
    np.testing.assert_array_equal(start.load, np.zeros(4))
    stepped = router.after_step(BiasState(jnp.asarray([0.5, 0.0, -1.0, 2.0]), jnp.asarray([7.0, 1.0, 4.0, 4.0])))
    np.testing.assert_array_equal(stepped.bias, oracle.next_bias([0.5, 0.0, -1.0, 2.0], [7, 1, 4, 4], 0.25))
    np.testing.assert_array_equal(stepped.bias, [0.25, 0.25, -1.0, 2.0])
    np.testing.assert_array_equal(stepped.load, np.zeros(4))
    still = router.after_step(BiasState(jnp.asarray([0.5, 0.0, -1.0, 2.0]), jnp.zeros(4)))
    np.testing.assert_array_equal(still.bias, [0.5, 0.0, -1.0, 2.0])


def test_a_bias_balances_a_skewed_router_within_600_steps():
    e, k, s, steps, last = 8, 2, 64, 600, 50

    def simulate(rate):
        router = SigmoidBiasRouter(M, e, k, rate=rate, capacity=Capacity(None), rngs=nnx.Rngs(0))
        draw = np.random.default_rng(5)
        kernel = draw.normal(size=(M, e)) * 0.5
        kernel[0] = np.linspace(-1.5, 1.5, e)
        router.kernel.set_value(jnp.asarray(kernel, jnp.float32))
        valid = jnp.ones((G, s), bool)

        def step(state, rng):
            tokens = jax.random.normal(rng, (G, s, M)).at[..., 0].set(1.0)
            state = router(tokens, valid, rng, state).state
            return router.after_step(state), state.load

        return jax.jit(lambda: jax.lax.scan(step, router.initial_state(), jax.random.split(jax.random.key(0), steps)))()

    def violation(loads):
        return float(loads.sum(0).max() / loads.sum(0).mean() - 1)

    state, loads = simulate(0.002)
    assert float(loads[0].sum()) == G * s * k
    assert violation(loads[:last]) > 1.0
    assert violation(loads[-last:]) < 0.2
    assert np.asarray(state.bias)[0] > np.asarray(state.bias)[-1]
    _, unmoved = simulate(0.0)
    assert violation(unmoved[-last:]) > 1.0


def test_the_bias_moves_by_the_sign_of_the_violation_alone():
    moved = bias_update(jnp.asarray([0.5, 0.0, 0.0, -1.0]), jnp.asarray([100.0, 1.0, 1.0, 34.0]), 0.25)
    np.testing.assert_array_equal(moved, [0.25, 0.25, 0.25, -1.0])
