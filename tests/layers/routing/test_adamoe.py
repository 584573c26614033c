"""Null experts against loops, what they save, and what the loss makes of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import assume, given, settings

from gshardx.errors import BadInput
from gshardx.layers import Einsum, Experts, Gather, MoE, Ragged
from gshardx.layers.routing import AdaMoERouter, Capacity
from tests.layers.routing.cases import DRAWN, G, M, capacity_of, check, compiled, data
from tests.oracles import adamoe as oracle

SETTINGS = {
    "four of eight and eight": ((12, 8, 4), Capacity(None), {}, 8),
    "one null, tight": ((13, 3, 3), Capacity(0.5), {"null_experts": 1}, 1),
    "one token": ((1, 3, 2), Capacity(0.01), {"null_experts": 5}, 5),
}


@pytest.mark.parametrize("name", SETTINGS)
@settings(max_examples=12, deadline=None)
@given(**DRAWN)
def test_equals_the_loops_in_every_setting(name, seed, kind, padding):
    (s, e, k), capacity, options, n = SETTINGS[name]
    tokens, kernel, valid = data(seed, kind, s, e, padding=padding)
    nulls = data(seed + 1, kind, s, n)[1]  # with the kind "ties" equal to all experts
    call = compiled(AdaMoERouter, e, k, capacity=capacity, **options)
    routing, logits = call(kernel, tokens, valid, jax.random.key(0), nulls=nulls)
    slots = capacity_of(capacity, s, e, k, training=True)
    logits = np.asarray(logits, np.float64)
    groups = [oracle.route(logits[g], k, slots, valid[g], num_experts=e) for g in range(G)]
    assume(min(group.margin for group in groups) > 1e-5)
    assert routing.capacity == slots
    check(routing, groups)


def leaning(by):
    """A routing whose nulls' logits of every token are higher by ``by``, and its tokens."""
    tokens, kernel, valid = data(0, "random", 32, 8, padding="some")
    tokens[..., 0], kernel[0] = 1, 0
    nulls = 0.1 * np.ones((M, 8), np.float32)
    nulls[0] = by
    call = compiled(AdaMoERouter, 8, 4, capacity=Capacity(None))
    return call(kernel, tokens, valid, None, nulls=nulls)[0], jnp.asarray(tokens), valid


def test_the_more_null_choices_the_fewer_true_experts_slots_and_rows():
    before = 4.0
    for by in (-1.0, 0.0, 1.0, 2.0):
        routing, tokens, valid = leaning(by)
        stats = routing.stats
        mean = float(stats.choices.sum() / stats.tokens)
        assert 0 < mean < before
        before = mean
        kept = int(np.asarray(routing.keep).sum())
        assert kept == int(stats.load.sum()) == round(mean * valid.sum())
        assert int(Ragged().dispatch(tokens, routing).sizes.sum()) == kept
        per_token = np.asarray(routing.keep).sum(-1)[valid]
        assert len(set(per_token)) > 1, "tokens differ in what they need"


@pytest.mark.parametrize("dispatcher", [Einsum(), Gather(), Ragged()], ids=lambda d: type(d).__name__)
def test_a_token_that_chooses_nulls_alone_gets_exactly_nothing(dispatcher):
    rngs = nnx.Rngs(0)
    moe = MoE(AdaMoERouter(M, 8, 2, rngs=rngs), dispatcher, Experts(8, M, 6, "gelu", biases=True, rngs=rngs))
    moe.router.nulls.set_value(jnp.zeros((M, 8)).at[0].set(50.0))  # the first half of the tokens go there
    moe.experts.b_down.set_value(jnp.ones_like(moe.experts.b_down[...]))
    x = jax.random.normal(jax.random.key(0), (G, 8, M)).at[:, :4, 0].set(1.0).at[:, 4:, 0].set(-1.0)
    graph, params = nnx.split(moe)

    def loss(params):
        out, metrics = nnx.merge(graph, params)(x, jnp.ones(x.shape[:2], bool), None)
        return jnp.sum(jnp.sin(out)), (out, metrics)

    gradient, (out, metrics) = jax.jit(jax.grad(loss, has_aux=True))(params)
    np.testing.assert_array_equal(out[:, :4], 0.0)
    assert (np.abs(out[:, 4:]).max(-1) > 0.1).all()
    assert (np.asarray(metrics.experts)[:, :4] >= 8).all()
    assert not np.asarray(metrics.kept)[:, :4].any()
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


@pytest.mark.parametrize("by", [-2.0, 3.0])
def test_the_loss_brings_the_nulls_to_their_share(by):
    """From too few null choices and from too many; k e / (e + n) of four true experts a token is two."""
    tokens, kernel, valid = data(0, "random", 32, 8)
    tokens[..., 0] = 1
    nulls = np.zeros((M, 8), np.float32)
    nulls[0] = by
    call = compiled(AdaMoERouter, 8, 4, capacity=Capacity(None))

    @jax.jit
    def step(parameters, _):
        def loss(parameters):
            routing = call(parameters[0], tokens, valid, None, nulls=parameters[1])[0]
            return routing.losses["balance"], routing.stats

        gradient, stats = jax.grad(loss, has_aux=True)(parameters)
        moved = jax.tree.map(lambda p, d: p - d, parameters, gradient)
        return moved, stats.choices.sum() / stats.tokens

    _, means = jax.lax.scan(step, (jnp.asarray(kernel), jnp.asarray(nulls)), length=200)
    assert abs(means[0] - 2) > 0.7
    np.testing.assert_allclose(means[-50:].mean(), 2.0, atol=0.1)


def test_the_balance_loss_is_one_at_balance_whatever_the_nulls():
    for n in (1, 3, 16):
        call = compiled(AdaMoERouter, 8, 2, null_experts=n)
        tokens, kernel, valid = data(0, "ties", 12, 8)
        losses = call(kernel, tokens, valid, None, nulls=np.zeros((M, n), np.float32))[0].losses
        np.testing.assert_allclose(losses["balance"], 1.0, rtol=1e-6)


def test_no_null_expert_is_refused():
    with pytest.raises(BadInput, match=r"null_experts = 0: .* use the router top_k"):
        AdaMoERouter(M, 8, 2, null_experts=0, rngs=nnx.Rngs(0))
