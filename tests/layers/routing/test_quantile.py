"""Quantile balancing against loops, and how soon it evens a skewed router."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import assume, given, settings

from gshardx.errors import BadInput
from gshardx.layers.routing import Capacity, QuantileRouter
from gshardx.layers.routing.quantile import QuantileState, quantiles
from tests.layers.routing.cases import DRAWN, G, M, capacity_of, check, compiled, data
from tests.oracles import quantile as oracle

SETTINGS = {
    "megatron": ((12, 8, 2), Capacity(None), {"score": "softmax"}),
    "kimi_k3": ((12, 8, 3), Capacity(0.6), {"choose_by": "sigmoid", "scale": 2.5, "priority": "gate"}),
    "raw": ((13, 3, 1), Capacity(0.7), {"renormalise": False, "momentum": 0.9}),
    "one_token": ((1, 3, 2), Capacity(0.01), {"score": "softmax", "choose_by": "sigmoid"}),
}


def state_of(seed, e, kind):
    draw = np.random.default_rng(seed)
    beta = np.zeros(e) if kind == "ties" and seed % 2 else draw.normal(size=e) / 4
    return QuantileState(*(jnp.asarray(x, jnp.float32) for x in (beta, draw.normal(size=e), draw.integers(0, 9))))


@pytest.mark.parametrize("name", SETTINGS)
@settings(max_examples=12, deadline=None)
@given(**DRAWN)
def test_equals_the_loops_in_every_setting(name, seed, kind, padding):
    (s, e, k), capacity, options = SETTINGS[name]
    tokens, kernel, valid = data(seed, kind, s, e, padding=padding)
    state = state_of(seed, e, kind)
    call = compiled(QuantileRouter, e, k, capacity=capacity, **options)
    routing, logits = call(kernel, tokens, valid, jax.random.key(0), state)
    slots = capacity_of(capacity, s, e, k, training=True)
    formula = {name: value for name, value in options.items() if name != "momentum"}
    found = [
        oracle.route(np.asarray(logits[g]), k, slots, valid[g], np.asarray(state.beta), **formula) for g in range(G)
    ]
    groups, totals, counts = zip(*found, strict=True)
    assume(min(group.margin for group in groups) > 1e-6)
    assert routing.capacity == slots
    check(routing, groups, scale=options.get("scale", 1.0))
    np.testing.assert_array_equal(routing.state.beta, state.beta)
    np.testing.assert_allclose(routing.state.total, state.total + sum(totals), atol=1e-4)
    np.testing.assert_array_equal(routing.state.tokens, state.tokens + sum(counts))


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_step_takes_the_mean_over_tokens_and_forgets_it(momentum):
    router = QuantileRouter(M, 3, 1, momentum=momentum, rngs=nnx.Rngs(0))
    for leaf in jax.tree.leaves(router.initial_state()):
        np.testing.assert_array_equal(leaf, 0.0)
    beta, total = [0.5, 0.0, -0.5], [4.0, -8.0, 16.0]
    stepped = router.after_step(QuantileState(jnp.asarray(beta), jnp.asarray(total), jnp.float32(4)))
    np.testing.assert_allclose(stepped.beta, oracle.next_beta(beta, total, 4, momentum), atol=1e-6)
    assert float(stepped.beta.sum()) == pytest.approx(0.0, abs=1e-6)
    assert not np.any(stepped.total)
    assert not stepped.tokens
    still = router.after_step(QuantileState(jnp.asarray(beta), jnp.zeros(3), jnp.zeros(())))
    np.testing.assert_array_equal(still.beta, beta)


def test_as_many_margins_as_asked_for_exceed_the_quantile():
    margins = np.random.default_rng(0).normal(size=(2, 16, 3)).astype(np.float32)
    valid = np.arange(16) < np.array([16, 8])[:, None]
    found, tokens = quantiles(jnp.asarray(margins), jnp.asarray(valid), 0.25)
    above = (margins > np.asarray(found)[:, None]) & valid[..., None]
    np.testing.assert_array_equal(above.sum(1), [[4] * 3, [2] * 3])
    np.testing.assert_array_equal(tokens, [[16], [8]])


@pytest.mark.parametrize("options", [{}, {"choose_by": "sigmoid"}], ids=str)
def test_a_skewed_router_is_even_after_a_few_steps(options):
    e, k, s, groups, steps = 8, 2, 64, 8, 30
    router = QuantileRouter(M, e, k, capacity=Capacity(None), rngs=nnx.Rngs(0), **options)
    kernel = np.random.default_rng(5).normal(size=(M, e)) * 0.5
    kernel[0] = np.linspace(-1.5, 1.5, e)
    router.kernel.set_value(jnp.asarray(kernel, jnp.float32))

    def step(state, rng):
        tokens = jax.random.normal(rng, (groups, s, M)).at[..., 0].set(1.0)
        routing = router(tokens, jnp.ones((groups, s), bool), rng, state)
        return router.after_step(routing.state), routing.stats.load

    keys = jax.random.split(jax.random.key(0), steps)
    loads = np.asarray(jax.jit(lambda: jax.lax.scan(step, router.initial_state(), keys))()[1])
    violation = loads.max(1) / loads.mean(1) - 1
    assert violation[0] > 1.0
    assert violation[5:].mean() < 0.3
    together = loads[5:].sum(0)
    assert together.max() / together.mean() - 1 < 0.2


def test_inference_chooses_by_the_state_and_leaves_it():
    tokens, kernel, valid = data(0, "random", 12, 8)
    state = QuantileState(jnp.zeros(8).at[5].set(-20.0), jnp.ones(8), jnp.float32(3))
    routing, logits = compiled(QuantileRouter, 8, 2, capacity=Capacity(None))(kernel, tokens, valid, None, state)
    assert (np.asarray(routing.experts)[..., 0] == 5).all()
    jax.tree.map(np.testing.assert_array_equal, routing.state, state)
    scores = np.take_along_axis(1 / (1 + np.exp(-np.asarray(logits))), np.asarray(routing.experts), axis=-1)
    expected = scores / scores.sum(-1, keepdims=True) * valid[..., None]
    np.testing.assert_allclose(routing.weights, expected, atol=1e-6)


def test_no_gradient_reaches_beta_or_the_quantile():
    tokens, kernel, valid = data(1, "random", 12, 8)
    call, state = compiled(QuantileRouter, 8, 3, capacity=Capacity(None)), state_of(1, 8, "random")

    def loss(kernel, beta):
        routing = call(kernel, tokens, valid, jax.random.key(0), state._replace(beta=beta))[0]
        return jnp.sum(routing.weights**2) + routing.losses["balance"], jnp.sum(routing.state.total)

    def parts(pick):
        return jax.grad(lambda kernel, beta: loss(kernel, beta)[pick], argnums=(0, 1))(kernel, state.beta)

    of_kernel, of_beta = parts(0)
    np.testing.assert_array_equal(of_beta, 0.0)
    assert np.abs(of_kernel).max() > 0.01
    np.testing.assert_array_equal(parts(1)[0], 0.0)


@pytest.mark.parametrize(("options", "said"), [({"top_k": 4}, "nothing to balance"), ({"momentum": 1.0}, "below 1")])
def test_options_that_can_not_be_are_refused(options, said):
    with pytest.raises(BadInput, match=said):
        QuantileRouter(M, 4, **{"top_k": 2, **options}, rngs=nnx.Rngs(0))
