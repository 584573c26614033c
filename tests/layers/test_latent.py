"""Latent attention against a NumPy twin, and what is kept against what is made of it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gshardx.errors import BadInput
from gshardx.layers import KVCache, LatentAttention, LatentPages, Packed, Paged, Rope

WIDTH, HEADS, TIME = 12, 3, 7
SIZES = {"kv_rank": 8, "rope_dim": 4, "nope_dim": 6, "value_dim": 5}
OPTIONS = {
    "whole queries": {},
    "compressed queries": {"q_rank": 10},
    "biases, scale, epsilon": {"q_rank": 10, "biases": True, "scale": 0.7, "latent_epsilon": 0.1},
    "interleaved, stretched": {"rope": Rope(interleaved=True, scaling="linear", factor=2.0, magnitude=1.3)},
}


def attention(options):
    """With random values in what starts at 0 or 1."""
    made = LatentAttention(WIDTH, HEADS, rngs=nnx.Rngs(0), **SIZES, **options)
    draw = np.random.default_rng(0)
    for _, parameter in nnx.iter_graph(made):
        if isinstance(parameter, nnx.Param):
            parameter.set_value(parameter.get_value() + draw.normal(0, 0.3, parameter.shape).astype(np.float32))
    return made


def given(rows=1):
    x = np.random.default_rng(1).normal(0, 1, (rows, TIME, WIDTH)).astype(np.float32)
    return jnp.asarray(x), jnp.tile(jnp.arange(TIME, dtype=jnp.int32), (rows, 1))


def turned(x, rope):
    """``[t, d]``"""
    half, d = x.shape[-1] // 2, x.shape[-1]
    angle = np.arange(TIME)[:, None] / rope.factor * 10_000.0 ** (-np.arange(half) / half)
    pairs = [(2 * i, 2 * i + 1) if rope.interleaved else (i, i + half) for i in range(half)]
    out = np.empty((TIME, d))
    for i, (one, other) in enumerate(pairs):
        cos, sin = np.cos(angle[:, i]) * rope.scale, np.sin(angle[:, i]) * rope.scale
        out[:, one], out[:, other] = x[:, one] * cos - x[:, other] * sin, x[:, other] * cos + x[:, one] * sin
    return out


def twin(weights, options, x):
    """One sequence ``[t, m]`` in float64, head by head, as the paper's equations 37 to 47 have it."""
    rope, epsilon = options.get("rope", Rope()), options.get("latent_epsilon", 1e-6)

    def normed(y, scale):
        return y / np.sqrt((y**2).mean(-1, keepdims=True) + epsilon) * scale

    queries, w_q = x, weights.get("w_q", weights.get("w_q_b"))
    if "q_rank" in options:
        queries = normed(x @ weights["w_q_a"] + weights.get("b_q_a", 0), weights["q_norm"])
    both = x @ weights["w_kv_a"] + weights.get("b_kv_a", 0)
    latent, key = normed(both[:, :8], weights["kv_norm"]), turned(both[:, 8:], rope)
    out = weights.get("b_o", 0)
    for head in range(HEADS):
        q, kv = queries @ w_q[:, head], latent @ weights["w_kv_b"][:, head]
        scores = q[:, :6] @ kv[:, :6].T + turned(q[:, 6:], rope) @ key.T
        scores = np.where(np.tri(TIME, dtype=bool), scores * options.get("scale", 10**-0.5), -np.inf)
        share = np.exp(scores - scores.max(-1, keepdims=True))
        out = out + share / share.sum(-1, keepdims=True) @ kv[:, 6:] @ weights["w_o"][head]
    return out


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_each_option_computes_what_its_twin_does(options):
    made, weights = attention(options), {}
    for name, value in vars(made).items():
        found = value.scale if name.endswith("_norm") else value
        if isinstance(found, nnx.Param):
            weights[name] = np.asarray(found.get_value(), np.float64)
    x, places = given()
    out, _ = made(x, places, Packed.of(jnp.ones((1, TIME), jnp.int32)), 0)
    np.testing.assert_allclose(out[0], twin(weights, options, np.asarray(x[0], np.float64)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", list(OPTIONS.values())[1:3], ids=list(OPTIONS)[1:3])
def test_what_is_absorbed_is_what_is_expanded(options):
    """A prompt of three tokens, then one token a call; of a layer and token only the latent vector and the key stay."""
    made, (x, places) = attention(options), given(rows=2)
    whole, _ = made(x, places, Packed.of(jnp.ones((2, TIME), jnp.int32)), 0)
    cache = KVCache(jnp.zeros((1, 2, TIME, 1, 12)), None, places)
    pages = (LatentPages(jnp.zeros((1, 9, 1, 12, 2)), 8),)
    tables, longest = jnp.arange(1, 9, dtype=jnp.int32).reshape(1, 2, 4), jnp.int32(4)

    @jax.jit
    def step(x, places, k, pages):
        one, cache = made(x, places, KVCache(k, None, places), 0)
        flat, count = x.reshape(1, -1, WIDTH), x.shape[1]
        row = jnp.repeat(jnp.arange(2, dtype=jnp.int32), count)[None]
        memory = Paged(pages, tables, row, places.reshape(1, -1), longest)
        other, memory = made(flat, places.reshape(1, -1), memory, 0)
        return one, other.reshape(x.shape), cache.k, memory.pools

    k, found = cache.k, []
    for first, last in ((0, 3), (3, 4), (4, 5), (5, 6)):
        one, other, k, pages = step(x[:, first:last], places[:, first:last], k, pages)
        found.append((one, other))
    for results in zip(*found, strict=True):
        np.testing.assert_allclose(jnp.concatenate(results, 1), whole[:, :6], rtol=1e-5, atol=1e-5)
    assert sum(leaf.size for leaf in jax.tree.leaves((k, None))) == 2 * TIME * (8 + 4)


@pytest.mark.parametrize(
    ("sizes", "said"), [({"rope_dim": 3}, "rope_dim = 3: .* use 4"), ({"q_rank": 0}, "q_rank = 0: must be above 0")]
)
def test_sizes_that_can_not_be_are_said(sizes, said):
    with pytest.raises(BadInput, match=said):
        LatentAttention(WIDTH, HEADS, rngs=nnx.Rngs(0), **SIZES | sizes)
