"""Zero, copy and constant experts against loops, and what they make of tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import assume, given, settings

from gshardx.errors import BadInput
from gshardx.layers import Einsum, Experts, Gather, MoE, Ragged, kinds_of
from gshardx.layers.routing import Capacity, MoePlusPlusRouter
from tests.layers.routing.cases import DRAWN, G, M, check, compiled, data
from tests.oracles import moe_pp as oracle

SETTINGS = {
    "the paper's, of twelve": ((12, 8, 2), Capacity(1.1), {}, (1, 1, 2)),
    "tight": ((13, 4, 3), Capacity(0.5), {"zero": 0, "copy": 2, "constant": 1, "tau": 0.25}, (0, 2, 1)),
    "normalised": ((9, 3, 3), Capacity(None), {"zero": 2, "renormalise": True, "constant": 0}, (2, 1, 0)),
}


@pytest.mark.parametrize("name", SETTINGS)
@settings(max_examples=12, deadline=None)
@given(**DRAWN)
def test_equals_the_loops_in_every_setting(name, seed, kind, padding):
    (s, e, k), capacity, options, kinds = SETTINGS[name]
    tokens, kernel, valid = data(seed, kind, s, e, padding=padding)
    others = data(seed + 1, kind, s, sum(kinds))[1]
    call = compiled(MoePlusPlusRouter, e, k, capacity=capacity, **options)
    routing, logits = call(kernel, tokens, valid, jax.random.key(0), local=others)
    slots = oracle.slots(s, e, k, capacity.factor, sum(kinds), options.get("tau", 0.75))
    own = {name: options[name] for name in ("tau", "renormalise") if name in options}
    logits = np.asarray(logits, np.float64)
    groups = [oracle.route(logits[g], k, slots, valid[g], kinds=kinds, **own) for g in range(G)]
    assume(min(group.margin for group, _ in groups) > 1e-5)
    assert routing.capacity == slots
    check(routing, [group for group, _ in groups])
    np.testing.assert_allclose(routing.local, [local for _, local in groups], atol=1e-6)


def layer(dispatcher, zero=1, copy=1, constant=2, **options):
    rngs = nnx.Rngs(0)
    router = MoePlusPlusRouter(M, 8, 2, zero=zero, copy=copy, constant=constant, **options, rngs=rngs)
    experts = Experts(8, M, 6, "gelu", biases=True, rngs=rngs)
    experts.b_down.set_value(jnp.ones_like(experts.b_down[...]))
    return MoE(router, dispatcher, experts, kinds=kinds_of(router, M, rngs=rngs))


def sent_to(moe, first, second):
    """The same layer, whose every token chooses local expert ``first`` and then ``second``."""
    columns = jnp.zeros((M, sum(moe.router.kinds))).at[0, first].set(20.0).at[0, second].set(19.0)
    moe.router.local.set_value(columns)
    x = jax.random.normal(jax.random.key(0), (G, 8, M)).at[..., 0].set(1.0)
    return moe, x, jnp.ones(x.shape[:2], bool)


@pytest.mark.parametrize("dispatcher", [Einsum(), Gather(), Ragged()], ids=lambda d: type(d).__name__)
def test_zeros_give_exactly_nothing_and_copies_exactly_their_weight_of_the_token(dispatcher):
    moe, x, valid = sent_to(layer(dispatcher, zero=2), 0, 1)
    out, metrics = jax.jit(moe)(x, valid, None)
    np.testing.assert_array_equal(out, 0.0)
    assert (np.asarray(metrics.experts) >= 8).all()
    assert not np.asarray(metrics.kept).any()
    moe, x, valid = sent_to(layer(dispatcher), 0, 1)
    routing = moe.router(x, valid, None)
    np.testing.assert_array_equal(jax.jit(moe)(x, valid, None)[0], routing.local[..., 1, None] * x)
    assert (np.asarray(routing.local)[..., 1] > 0.2).all()


@pytest.mark.parametrize("constant", [0, 3])
def test_a_layer_equals_one_token_at_a_time(constant):
    moe = layer(Gather(), zero=1, copy=2, constant=constant, capacity=Capacity(None))
    moe.router.kernel.set_value(jax.random.normal(jax.random.key(1), (M, 8)))
    moe.router.local.set_value(jax.random.normal(jax.random.key(2), (M, 3 + constant)))
    x = jax.random.normal(jax.random.key(0), (G, 40, M))
    valid = jnp.arange(40) < jnp.asarray([[40], [25]])
    out, metrics = jax.jit(moe)(x, valid, jax.random.key(3))
    routing = moe.router(x, valid, jax.random.key(3))
    every = moe.experts(jnp.broadcast_to(x.reshape(1, -1, M), (8, G * 40, M))[:, None])[:, 0].reshape(8, G, 40, M)
    shares, values = (
        np.asarray(p[...], np.float64) if constant else None for p in (moe.kinds.shares, moe.kinds.values)
    )
    met = set()
    for g, t in np.ndindex(G, 40):
        routed = sum(
            float(w) * np.asarray(every[e, g, t], np.float64)
            for e, w, kept in zip(routing.experts[g, t], routing.weights[g, t], routing.keep[g, t], strict=True)
            if kept
        )
        here = oracle.computed(np.asarray(x[g, t], np.float64), routing.local[g, t], (1, 2, constant), shares, values)
        np.testing.assert_allclose(out[g, t], routed + here, atol=1e-5)
        met |= set(np.asarray(metrics.experts)[g, t])
    assert met >= set(range(8, 11 + constant)), "all of each kind"


def test_gradients_reach_the_constants_and_every_column():
    moe = layer(Gather())
    moe.router.kernel.set_value(jax.random.normal(jax.random.key(1), (M, 8)))
    moe.router.local.set_value(jax.random.normal(jax.random.key(2), (M, 4)))
    x = jax.random.normal(jax.random.key(0), (G, 40, M))
    graph, params = nnx.split(moe)
    gradient = jax.grad(lambda p: jnp.sum(jnp.sin(nnx.merge(graph, p)(x, jnp.ones(x.shape[:2], bool), None)[0])))(
        params
    )
    for part in (gradient["kinds"]["shares"], gradient["kinds"]["values"], gradient["router"]["local"]):
        assert (np.abs(part[...]).max(0) > 1e-6).all()


def test_the_loss_brings_each_kind_to_its_share():
    """Of all choices, local experts' are z / tau of e + z / tau."""
    tokens, kernel, valid = data(0, "random", 32, 8)
    tokens[..., 0] = 1
    local = np.zeros((M, 4), np.float32)
    local[0] = -1.0
    call = compiled(MoePlusPlusRouter, 8, 4, tau=0.5, capacity=Capacity(None))

    @jax.jit
    def step(parameters, _):
        def loss(parameters):
            routing = call(parameters[0], tokens, valid, None, local=parameters[1])[0]
            return routing.losses["balance"], routing.stats

        gradient, stats = jax.grad(loss, has_aux=True)(parameters)
        return jax.tree.map(lambda p, d: p - d, parameters, gradient), stats.choices.sum() / stats.tokens

    _, means = jax.lax.scan(step, (jnp.asarray(kernel), jnp.asarray(local)), length=300)
    assert means[0] > 2.5
    np.testing.assert_allclose(means[-50:].mean(), 4 * 8 / 16, atol=0.15)


@pytest.mark.parametrize(("chosen", "expected"), [((0, 1, 2, 2), 1.0), ((0, 1, 0, 2), 1.375), ((0, 0, 0, 0), 4.0)])
def test_the_balance_loss_is_one_where_a_local_expert_has_two_choices_for_one(chosen, expected):
    """Four tokens, sure of their choice, of two feed-forward experts and a local one: D = 2 + 1 / tau = 4."""
    columns = 50 * np.eye(3, dtype=np.float32)[list(chosen)]
    call = compiled(MoePlusPlusRouter, 2, 1, zero=1, copy=0, constant=0, tau=0.5)
    tokens, valid = np.eye(M, dtype=np.float32)[None], np.ones((1, M), bool)
    losses = call(columns[:, :2], tokens, valid, None, local=columns[:, 2:])[0].losses
    np.testing.assert_allclose(losses["balance"], expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "said"),
    [({"zero": 0, "copy": 0, "constant": 0}, "use the router top_k"), ({"tau": 0.0}, r"tau = 0.0: .* has 0.75")],
)
def test_what_can_not_be_is_one_line(options, said):
    with pytest.raises(BadInput, match=said):
        MoePlusPlusRouter(M, 8, 2, **options, rngs=nnx.Rngs(0))


def test_a_layer_without_the_kinds_says_what_it_lacks():
    rngs = nnx.Rngs(0)
    moe = MoE(MoePlusPlusRouter(M, 8, 2, rngs=rngs), Gather(), Experts(8, M, 6, "gelu", rngs=rngs))
    with pytest.raises(BadInput, match=r"give kinds=kinds_of"):
        moe(jnp.zeros((1, 4, M)), jnp.ones((1, 4), bool), None)
