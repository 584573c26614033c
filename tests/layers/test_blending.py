"""One network merged from experts, against loops: values, slopes, cost, and what it is for one expert alone."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from gshardx.errors import BadInput
from gshardx.layers import Auto, Blend, Blending, Experts, LoryRouter, MoE, SmearRouter, TopKRouter
from tests.oracles import blending as oracle
from tests.oracles import lory

G, N, E, M, H = 2, 2, 3, 4, 5


@functools.cache
def made(activation, biases):
    experts = Experts(E, M, H, activation, biases=biases, rngs=nnx.Rngs(0))
    for name, value in vars(experts).items():
        if name.startswith("b_") and value is not None:
            value.set_value(jax.random.normal(jax.random.key(len(name)), value.shape))
    return experts, jax.jit(lambda tokens, mix: experts(Blend(tokens, mix)))


def weights_of(experts):
    return {name: np.asarray(w[...]) for name, w in vars(experts).items() if name[:2] in ("w_", "b_") and w is not None}


def drawn(seed, stretch):
    draw = np.random.default_rng(seed)
    tokens = draw.normal(size=(G, N, stretch, M)).astype(np.float32)
    return tokens, draw.dirichlet(np.ones(E), (G, N)).astype(np.float32)


@pytest.mark.parametrize("stretch", [1, 3])
@pytest.mark.parametrize(("activation", "biases"), [("swiglu", True), ("relu", False)])
@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_equals_the_loops(activation, biases, stretch, seed):
    experts, call = made(activation, biases)
    tokens, mix = drawn(seed, stretch)
    out = call(tokens, mix)
    for g, n in np.ndindex(G, N):
        expected = oracle.network(tokens[g, n], mix[g, n], weights_of(experts), activation)
        np.testing.assert_allclose(out[g, n], expected, atol=1e-5)


@pytest.mark.parametrize("stretch", [1, 3])
def test_gradients_are_the_slopes_of_the_loops(stretch):
    experts, _ = made("swiglu", True)
    graph, params = nnx.split(experts)
    tokens, mix = drawn(0, stretch)

    @jax.jit
    @functools.partial(jax.grad, argnums=(0, 1, 2))
    def gradient(params, tokens, mix):
        return jnp.sum(jnp.sin(nnx.merge(graph, params)(Blend(tokens, mix))))

    def total(weights, tokens, mix):
        parts = [oracle.network(tokens[at], mix[at], weights, "swiglu") for at in np.ndindex(G, N)]
        return np.sin(parts).sum()

    slopes = gradient(params, tokens, mix)
    given_ = {name: w.astype(np.float64) for name, w in weights_of(experts).items()}
    named = {path[0].key: np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(slopes[0])}
    draw, step = np.random.default_rng(1), 1e-5
    assert set(named) == set(given_)
    for name in (*named, "tokens", "mix"):
        arguments = {"weights": given_, "tokens": tokens.astype(np.float64), "mix": mix.astype(np.float64)}
        of = arguments.get(name, given_.get(name))
        direction = draw.normal(size=of.shape)
        ends = []
        for sign in (1, -1):
            moved = of + sign * step * direction
            changed = {name: moved} if name in arguments else {"weights": {**given_, name: moved}}
            ends.append(total(**(arguments | changed)))
        slope = named[name] if name in named else np.asarray(slopes[1 if name == "tokens" else 2])
        assert np.isfinite(slope).all()
        np.testing.assert_allclose((slope * direction).sum(), (ends[0] - ends[1]) / (2 * step), rtol=1e-3, atol=1e-4)


def test_a_routers_gradients_are_the_slopes_of_the_loops_too():
    """Lory's, whose tokens act on the next segment's network."""
    router, experts = LoryRouter(M, E, segment=2, rngs=nnx.Rngs(0)), made("swiglu", False)[0]
    graph, params = nnx.split(router)
    draw = np.random.default_rng(3)
    x, kernel = draw.normal(size=(2, 6, M)).astype(np.float32), draw.normal(size=(M, E)).astype(np.float32)
    valid, weights = np.array([[1, 1, 0, 1, 1, 1], [1, 0, 1, 1, 1, 0]], bool), weights_of(experts)

    @jax.jit
    @functools.partial(jax.grad, argnums=(0, 1))
    def gradient(x, kernel):
        with_kernel = nnx.merge(graph, jax.tree.map(lambda _: kernel, params))
        return jnp.sum(jnp.sin(MoE(with_kernel, Blending(), experts)(x, valid, None)[0]))

    def total(x, kernel):
        out = 0.0
        for row, real in zip(x, valid, strict=True):
            mixtures = lory.mixtures(row, real, kernel, np.zeros(E), 2)[1]
            for n, mix in enumerate(mixtures):
                here = slice(2 * n, 2 * n + 2)
                out += np.sin(oracle.network(row[here], mix, weights, "swiglu")[real[here]]).sum()
        return out

    slopes, step = gradient(x, kernel), 1e-5
    exact = [x.astype(np.float64), kernel.astype(np.float64)]
    for number, slope in enumerate(slopes):
        direction = draw.normal(size=slope.shape)
        ends = [total(*[a + sign * step * direction if i == number else a for i, a in enumerate(exact)])
                for sign in (1, -1)]  # fmt: skip
        np.testing.assert_allclose((slope * direction).sum(), (ends[0] - ends[1]) / (2 * step), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("stretch", [1, 3])
def test_a_mixture_of_one_expert_is_that_expert_alone(stretch):
    experts, call = made("swiglu", True)
    tokens, _ = drawn(2, stretch)
    alone = jax.jit(experts)(jnp.broadcast_to(tokens.reshape(1, 1, -1, M), (E, 1, G * N * stretch, M)))
    for expert in range(E):
        mix = np.zeros((G, N, E), np.float32)
        mix[..., expert] = 1.0
        np.testing.assert_allclose(call(tokens, mix).reshape(-1, M), alone[expert, 0], atol=1e-6)


def test_it_costs_one_network_and_the_merging():
    """FLOPs of the compiled program: 6 m h a token of a gated network, and 6 e m h a stretch."""
    e, m, h, g, n, stretch = 8, 64, 128, 2, 2, 64
    experts = Experts(e, m, h, "swiglu", rngs=nnx.Rngs(0))
    struct = jax.ShapeDtypeStruct
    blend = Blend(struct((g, n, stretch, m), jnp.float32), struct((g, n, e), jnp.float32))
    flops = jax.jit(experts).lower(blend).compile().cost_analysis()["flops"]
    expected = 6 * m * h * g * n * (stretch + e)
    assert expected <= flops < 1.05 * expected


def test_padding_adds_nothing_and_gets_nothing():
    moe = MoE(SmearRouter(M, E, rngs=nnx.Rngs(0)), Blending(), made("relu", True)[0])
    x = jax.random.normal(jax.random.key(0), (3, 6, M))
    valid = jnp.asarray([[1, 1, 0, 1, 0, 0], [0] * 6, [1] * 6], bool)
    run = jax.jit(moe)
    out, metrics = run(x, valid, jax.random.key(1))
    other, same = run(jnp.where(valid[..., None], x, 99.0), valid, jax.random.key(1))
    np.testing.assert_array_equal(out, other)
    np.testing.assert_array_equal(np.asarray(out)[~np.asarray(valid)], 0.0)
    jax.tree.map(np.testing.assert_array_equal, metrics, same)


def test_auto_merges_where_the_router_says_so():
    router, experts = LoryRouter(M, E, segment=2, rngs=nnx.Rngs(0)), made("swiglu", False)[0]
    x, valid = jax.random.normal(jax.random.key(0), (2, 6, M)), jnp.ones((2, 6), bool)
    by_name, chosen = (jax.jit(MoE(router, one, experts))(x, valid, None)[0] for one in (Blending(), Auto(H)))
    np.testing.assert_array_equal(by_name, chosen)


def test_routers_that_choose_are_no_match():
    moe = MoE(TopKRouter(M, E, 2, rngs=nnx.Rngs(0)), Blending(), made("swiglu", False)[0])
    with pytest.raises(TypeError, match="pair it with a router that has some"):
        jax.eval_shape(moe, jnp.zeros((1, 2, M)), jnp.ones((1, 2), bool), None)


def test_groups_of_several_rows_are_refused_and_parts_of_one_are_not():
    moe = MoE(SmearRouter(M, E, rngs=nnx.Rngs(0)), Blending(), made("swiglu", False)[0], group_size=12)
    x, valid = jnp.zeros((2, 6, M)), jnp.ones((2, 6), bool)
    with pytest.raises(BadInput, match=r"group_size = 12: .* a row of 6 tokens; use a divisor"):
        jax.eval_shape(moe, x, valid, jax.random.key(0))
    moe.group_size = 3
    assert jax.eval_shape(moe, x, valid, jax.random.key(0))[0].shape == x.shape
