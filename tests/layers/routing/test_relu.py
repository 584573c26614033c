"""ReLU routing against ReMoE's loops, and the coefficient that brings it to its mean number of experts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings

from gshardx.config import ModelConfig, MoEConfig
from gshardx.errors import BadInput
from gshardx.layers import Capacity, Experts, Gather, MoE
from gshardx.layers.routing import ReluRouter
from gshardx.layers.routing.relu import SparsityState
from gshardx.models.decoder import check_model
from tests.layers.routing.cases import DRAWN, G, M, check, compiled, data
from tests.oracles import choice
from tests.oracles import relu as oracle

SETTINGS = {
    "all": ((12, 8, 2), Capacity(1.25), {}),
    "few, tight": ((13, 5, 2), Capacity(0.4), {"most": 3}),
    "by gate": ((12, 4, 1), Capacity(0.3), {"most": 2, "priority": "gate"}),
}


def state_of(coefficient, active=0.0, tokens=0.0):
    return SparsityState(*(jnp.asarray(x, jnp.float32) for x in (coefficient, active, tokens)))


@pytest.mark.parametrize("name", SETTINGS)
@settings(max_examples=12, deadline=None)
@given(**DRAWN)
def test_equals_the_loops_in_every_setting(name, seed, kind, padding):
    (s, e, k), capacity, options = SETTINGS[name]
    tokens, kernel, valid = data(seed, kind, s, e, padding=padding)
    call = compiled(ReluRouter, e, k, capacity=capacity, **options)
    routing, logits = call(kernel, tokens, valid, jax.random.key(0), state_of(0.5, 3, 2))
    logits, most = np.asarray(logits), options.get("most", e)
    slots = choice.slots_per_expert(s, e, most, capacity.factor)
    priority = options.get("priority", "position")
    groups = [oracle.route(logits[g], most, slots, valid[g], priority=priority) for g in range(G)]
    assert routing.capacity == slots
    expected = oracle.sparsity(logits, valid, k, 0.5)
    np.testing.assert_allclose(routing.losses.pop("sparsity"), expected, rtol=1e-5, atol=1e-6)
    check(routing, groups, scale=10.0)
    assert routing.state.coefficient == 0.5
    assert routing.state.active == 3 + ((logits > 0) & valid[..., None]).sum()
    assert routing.state.tokens == 2 + valid.sum()


def test_gates_are_continuous_and_have_finite_gradients():
    tokens, kernel, valid = data(1, "random", 12, 8)
    call = compiled(ReluRouter, 8, 2, capacity=Capacity(None))

    def loss(kernel):
        routing = call(kernel, tokens, valid, None, state_of(1.0))[0]
        return jnp.sum(routing.weights**2) + sum(routing.losses.values())

    for scale in (1.0, 1e-12, 0.0):
        assert np.isfinite(jax.grad(loss)(scale * kernel)).all()
    gates = np.maximum(np.einsum("gsm,me->gse", tokens, kernel), 0)
    of_gates = 2 * np.einsum("gsm,gse->me", tokens, gates)
    plain = jax.grad(lambda w: jnp.sum(call(w, tokens, valid, None, state_of(1.0))[0].weights ** 2))(kernel)
    np.testing.assert_allclose(plain, of_gates, rtol=1e-4, atol=1e-4)


def test_a_token_that_no_expert_is_active_for_becomes_exactly_zero():
    rngs = nnx.Rngs(0)
    router = ReluRouter(M, 4, 2, capacity=Capacity(None), rngs=rngs)
    router.kernel.set_value(jnp.zeros((M, 4)).at[0].set(jnp.asarray([1.0, 2.0, -1.0, 0.0])))
    moe = MoE(router, Gather(), Experts(4, M, 6, "swiglu", biases=True, rngs=rngs))
    moe.experts.b_down.set_value(jnp.ones((4, M)))
    x = jax.random.normal(jax.random.key(1), (1, 6, M)).at[0, :, 0].set(jnp.asarray([1.0, 0, 0, -1, 2, 0]))
    out, metrics = jax.jit(moe)(x, jnp.ones((1, 6), bool), None, router.initial_state())
    np.testing.assert_array_equal(metrics.kept[0].sum(-1), [2, 0, 0, 1, 2, 0])
    np.testing.assert_array_equal(np.abs(np.asarray(out[0])).max(-1) == 0, [False, True, True, False, False, True])


def test_the_coefficient_moves_by_the_mean_over_tokens_and_layers():
    router = ReluRouter(M, 8, 2, rngs=nnx.Rngs(0))
    assert router.initial_state().coefficient == np.float32(1e-8)
    for counts in ([30.0, 1.0], [10.0, 13.0], [12.0, 12.0]):
        stepped = router.after_step_of_layers(state_of([0.5, 0.5], counts, [6.0, 6.0]))
        expected = oracle.next_coefficient(0.5, counts, 6, 2, 8)
        np.testing.assert_allclose(stepped.coefficient, [expected] * 2, rtol=1e-6)
        np.testing.assert_array_equal(stepped.active, [0.0, 0.0])
        np.testing.assert_array_equal(stepped.tokens, [0.0, 0.0])
    assert router.after_step(state_of(0.5)).coefficient == 0.5, "a step without tokens says nothing"
    np.testing.assert_allclose(router.after_step(state_of(0.5, 9.0, 3.0)).coefficient, 0.6, rtol=1e-6)
    for limit in (1e-20, 1e20):
        end = router.after_step(state_of(limit, 0.0 if limit < 1 else 99.0, 3.0)).coefficient
        np.testing.assert_allclose(end, limit, rtol=1e-6)


@pytest.mark.parametrize("start", [1e-8, 1.0])
def test_density_reaches_its_target(start):
    """SGD; tokens share a coordinate, as otherwise half of all linear gates are above 0 whatever the kernel."""
    e, k, steps, last = 8, 2, 400, 50
    router = ReluRouter(M, e, k, start=start, capacity=Capacity(None), rngs=nnx.Rngs(0))
    graph, params = nnx.split(router)
    goal = jax.random.normal(jax.random.key(1), (e, M))

    def step(carry, rng):
        params, state = carry
        tokens, valid = jax.random.normal(rng, (G, 32, M)).at[..., 0].set(1.0), jnp.ones((G, 32), bool)

        def loss(params):
            routing = nnx.merge(graph, params)(tokens, valid, rng, state)
            out = jnp.einsum("gsk,gskm->gsm", routing.weights, goal[routing.experts])
            return jnp.mean((out - tokens) ** 2) + routing.losses["sparsity"], routing.state

        gradient, state = jax.grad(loss, has_aux=True)(params)
        params = jax.tree.map(lambda p, g: p - 0.1 * g, params, gradient)
        return (params, router.after_step(state)), (state.active / state.tokens, state.coefficient)

    begin = params, router.initial_state()
    rngs = jax.random.split(jax.random.key(0), steps)
    _, (density, coefficient) = jax.jit(lambda: jax.lax.scan(step, begin, rngs))()
    assert np.isfinite(coefficient).all()
    assert abs(float(density[0]) - k) > 1
    assert abs(float(density[-last:].mean()) - k) < 0.15 * k


def test_it_needs_its_loss_and_no_other_router_has_it():
    config = ModelConfig(moe=MoEConfig(router="relu"))
    with pytest.raises(BadInput, match=r"router = relu: .* set model\.moe\.losses\.sparsity to 1\.0"):
        check_model(config)
    with pytest.raises(BadInput, match=r"losses\.sparsity is no loss of this router; use model\.moe\.router relu"):
        check_model(ModelConfig(moe=MoEConfig(losses={"sparsity": 1.0})))


@pytest.mark.parametrize("options", [{"most": 1}, {"most": 9}, {"growth": 1.0}, {"start": 0.0}], ids=str)
def test_options_that_cannot_be_met_are_refused(options):
    ((name, value),) = options.items()
    with pytest.raises(BadInput, match=f"{name} = {value}"):
        ReluRouter(M, 8, 2, **options, rngs=nnx.Rngs(0))
