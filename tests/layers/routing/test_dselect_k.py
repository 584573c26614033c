"""DSelect-k against loops; and that training ends with as many experts as there are selectors."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from gshardx.errors import BadInput
from gshardx.layers.routing import Capacity, DselectKRouter
from gshardx.layers.routing.dselect_k import smooth_step
from tests.layers.routing.cases import DRAWN, G, M, check, compiled, data
from tests.oracles import choice
from tests.oracles import dselect_k as oracle

SETTINGS = {
    "eight": ((12, 8, 2), Capacity(1.0), {}),
    "five, tight": ((13, 5, 2), Capacity(0.5), {"most": 3, "gamma": 2.0}),
    "three selectors": ((6, 4, 3), Capacity(None), {"gamma": 4.0}),
}


@pytest.mark.parametrize("name", SETTINGS)
@settings(max_examples=12, deadline=None)
@given(**{**DRAWN, "kind": st.sampled_from(["random", "ties", "one expert"])})  # equal digits tie but for rounding
def test_equals_the_loops_in_every_setting(name, seed, kind, padding):
    (s, e, k), capacity, options = SETTINGS[name]
    columns = k * ((e - 1).bit_length() + 1)
    tokens, kernel, valid = data(seed, kind, s, columns, padding=padding)
    call = compiled(DselectKRouter, e, k, capacity=capacity, **options)
    routing, raw = call(kernel, tokens, valid, jax.random.key(0))
    most = options.get("most", e)
    slots = choice.slots_per_expert(s, e, most, capacity.factor)
    raw, gamma = np.asarray(raw), options.get("gamma", 1.0)
    groups = [oracle.route(raw[g], e, k, most, slots, valid[g], gamma=gamma) for g in range(G)]
    assume(min(group.margin for group in groups) > 1e-6)
    assume(max(group.losses["selector_reach"] for group in groups) < 1e3)  # 1 / what rounding leaves of a selector
    assert routing.capacity == slots
    check(routing, groups)


def test_the_smooth_step_is_exact_at_its_ends_and_has_their_slope():
    x = jnp.asarray([-9.0, -1.0, -0.5, 0.0, 0.5, 1.0, 9.0])
    expected = [oracle.smooth_step(float(value), 2.0) for value in x]
    np.testing.assert_allclose(smooth_step(x, 2.0), expected, atol=1e-7)
    assert smooth_step(x, 2.0)[1] == 0
    assert smooth_step(x, 2.0)[-2] == 1
    slopes = jax.vmap(jax.grad(lambda value: smooth_step(value, 2.0)))(x)
    np.testing.assert_allclose(slopes, [0, 0, 0.5625, 0.75, 0.5625, 0, 0], atol=1e-6)


@pytest.mark.parametrize("e", [8, 6])
def test_training_ends_with_as_many_experts_as_selectors(e):
    """Four kinds of tokens, each of which is a mixture of two experts; 1 in 4 codes is no expert's where e is 6."""
    k, steps = 2, 600
    router = DselectKRouter(M, e, k, capacity=Capacity(None), rngs=nnx.Rngs(3))
    graph, params = nnx.split(router)
    tokens, valid = jnp.eye(M)[None], jnp.ones((1, M), bool)
    goal = np.zeros((M, e), np.float32)
    for kind in range(M):
        goal[kind, [kind, (kind + 2) % e]] = 0.7, 0.3
    optimizer = optax.adam(0.03)

    def gates(params):
        routing = nnx.merge(graph, params)(tokens, valid, jax.random.key(0))
        chosen = jax.nn.one_hot(routing.experts, e)
        return jnp.einsum("gsk,gske->se", routing.weights, chosen), routing

    def loss(params):
        found, routing = gates(params)
        return jnp.sum((found - goal) ** 2) + 0.01 * (
            routing.losses["selector_entropy"] + routing.losses["selector_reach"]
        )

    def step(carry, _):
        params, moments = carry
        gradient = jax.grad(loss)(params)
        updates, moments = optimizer.update(gradient, moments)
        return (optax.apply_updates(params, updates), moments), optax.global_norm(gradient)

    (params, _), norms = jax.jit(lambda: jax.lax.scan(step, (params, optimizer.init(params)), length=steps))()
    assert np.isfinite(norms).all()
    before, after = (np.asarray(gates(which)[0]) for which in (nnx.state(router, nnx.Param), params))
    assert (before > 0).all(), "all experts at first"
    assert ((after > 0).sum(-1) <= k).all()
    assert ((after > 0).sum(-1) == k).any()
    np.testing.assert_allclose(after.sum(-1), 1.0, atol=1e-5)


def test_gradients_are_finite_everywhere():
    tokens, kernel, valid = data(1, "random", 12, 8)
    call = compiled(DselectKRouter, 5, 2, capacity=Capacity(None))

    def loss(kernel):
        routing = call(kernel, tokens, valid, None)[0]
        return jnp.sum(routing.weights**2) + sum(routing.losses.values())

    for scale in (0.0, 1e-3, 1.0, 1e6):
        assert np.isfinite(jax.grad(loss)(scale * kernel)).all()


@pytest.mark.parametrize("options", [{"most": 1}, {"most": 9}, {"gamma": 0.0}], ids=str)
def test_options_that_cannot_be_met_are_refused(options):
    ((name, value),) = options.items()
    with pytest.raises(BadInput, match=f"{name} = {value}"):
        DselectKRouter(M, 8, 2, **options, rngs=nnx.Rngs(0))
