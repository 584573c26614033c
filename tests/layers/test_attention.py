"""Attention's options against a NumPy twin, each by itself and all at once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.test_util import check_grads

from gshardx.errors import BadInput
from gshardx.layers import Attention, FullPages, KVCache, Packed, Paged

WIDTH, HEADS, KV_HEADS, HEAD_DIM, TIME = 12, 4, 2, 6, 7
OPTIONS = {
    "none": {},
    "biases qkv": {"biases": "qkv"},
    "biases qkvo": {"biases": "qkvo"},
    "norm of heads": {"qk_norm": "head", "norm_epsilon": 0.1},
    "norm of all": {"qk_norm": "whole", "norm_epsilon": 0.1},
    "clip": {"qkv_clip": 0.4},
    "scale": {"scale": 0.7},
    "window": {"window": 3},
    "chunk": {"chunk": 3},
    "sinks": {"sinks": True},
    "l2 norm": {"qk_norm": "l2", "norm_epsilon": 0.1, "scale": 0.7},
    "temperature": {"temperature_floor": 2, "temperature_scale": 0.5},
    "all": {"biases": "qkvo", "qk_norm": "whole", "qkv_clip": 0.8, "scale": 1.3, "window": 3, "sinks": True},
    "no positions": {"nope": True},
    "full": {"chunk": 3, "window": 2, "full_every": 3, "nope": True, "qk_norm": "l2", "temperature_floor": 2},
}


def attention(options):
    """With random values in what starts at 0 or 1."""
    made = Attention(WIDTH, HEADS, KV_HEADS, HEAD_DIM, rngs=nnx.Rngs(0), **options)
    draw = np.random.default_rng(0)
    for _, parameter in nnx.iter_graph(made):
        if isinstance(parameter, nnx.Param):
            parameter.set_value(parameter.get_value() + draw.normal(0, 0.5, parameter.shape).astype(np.float32))
    return made


def turned(x, base=10_000.0):
    half = HEAD_DIM // 2
    angle = np.arange(TIME)[:, None, None] * base ** (-np.arange(half) / half)
    first, second = x[..., :half], x[..., half:]
    return np.concatenate([first * np.cos(angle) - second * np.sin(angle),
                           second * np.cos(angle) + first * np.sin(angle)], -1)  # fmt: skip


def normed(x, scale, over, epsilon):
    return x / np.sqrt((x**2).mean(over, keepdims=True) + epsilon) * scale


def sees(options, full, row, column):
    """Whether a query at ``row`` sees a key at ``column``."""
    near = row - column < options.get("window", TIME)
    together = row // options.get("chunk", TIME) == column // options.get("chunk", TIME)
    return column <= row and (full or (near and together))


def twin(weights, options, x, layer=0):
    """One sequence ``[t, m]`` in float64, head by head."""
    limited = "window" in options or "chunk" in options
    full = (layer + 1) % options["full_every"] == 0 if "full_every" in options else not limited
    mask = np.array([[sees(options, full, row, column) for column in range(TIME)] for row in range(TIME)])
    parts = {}
    for name in "qkv":
        y = np.einsum("tm,mnd->tnd", x, weights[f"w_{name}"])
        y = y + weights.get(f"b_{name}", 0)
        if name != "v" and options.get("qk_norm", "none") in ("head", "whole"):
            over = -1 if options["qk_norm"] == "head" else (-2, -1)
            y = normed(y, weights[f"{name}_norm"], over, options.get("norm_epsilon", 1e-6))
        limit = options.get("qkv_clip", np.inf)
        y = np.clip(y, -limit, limit)
        if name != "v" and not (options.get("nope") and full):
            y = turned(y)
            if options.get("qk_norm") == "l2":
                y = normed(y, 1.0, -1, options.get("norm_epsilon", 1e-6))
        if name == "q" and full and (floor := options.get("temperature_floor")):
            grown = np.log(1 + np.floor((np.arange(TIME) + 1) / floor)) * options.get("temperature_scale", 0.1) + 1
            y = y * grown[:, None, None]
        parts[name] = y
    out = weights.get("b_o", 0)
    for head in range(HEADS):
        k, v = (parts[name][:, head // (HEADS // KV_HEADS)] for name in "kv")
        scores = parts["q"][:, head] @ k.T * options.get("scale", HEAD_DIM**-0.5)
        share = np.where(mask, np.exp(scores), 0.0)
        beside = np.exp(weights["sinks"][head]) if "sinks" in weights else 0.0
        out = out + share / (share.sum(-1, keepdims=True) + beside) @ v @ weights["w_o"][head]
    return out


def drawn(made):
    """Parameters by name in float64, and an input ``[1, t, m]``."""
    weights = {}
    for name, value in vars(made).items():
        found = value.scale if name.endswith("_norm") and value is not None else value
        if isinstance(found, nnx.Param):
            weights[name] = np.asarray(found.get_value(), np.float64)
    return weights, np.random.default_rng(1).normal(0, 1, (1, TIME, WIDTH)).astype(np.float32)


PLACES = jnp.arange(TIME, dtype=jnp.int32)[None]


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_each_option_computes_what_its_twin_does(options):
    made = attention(options)
    weights, x = drawn(made)
    out, _ = made(jnp.asarray(x), PLACES, Packed.of(jnp.ones((1, TIME), jnp.int32)), 0)
    np.testing.assert_allclose(out[0], twin(weights, options, x[0]), rtol=1e-4, atol=1e-5)


MEMORIES = {
    "packed": lambda: Packed.of(jnp.ones((1, TIME), jnp.int32)),
    "cache": lambda: KVCache(*(jnp.zeros((3, 1, TIME + 2, KV_HEADS, HEAD_DIM)) for _ in "kv"), PLACES),
    "pages": lambda: Paged(
        tuple(FullPages(jnp.zeros((1, 4, KV_HEADS, HEAD_DIM, 4)), jnp.zeros((1, 4, KV_HEADS, 4, HEAD_DIM)))
              for _ in range(3)),
        jnp.asarray([[[2, 1]]]), jnp.zeros((1, TIME), jnp.int32), PLACES, jnp.int32(2),
    ),
}  # fmt: skip


@pytest.mark.parametrize("memory", MEMORIES.values(), ids=MEMORIES)
@pytest.mark.parametrize("layer", [1, 2])
def test_full_layers_take_turns_in_each_memory_whether_their_number_is_known_or_traced(memory, layer):
    options = OPTIONS["full"] | {"sinks": True}
    made = attention(options)
    weights, x = drawn(made)
    graph, state = nnx.split(made)
    traced = jax.jit(lambda state, x, layer: nnx.merge(graph, state)(x, PLACES, memory(), layer)[0])
    expected = twin(weights, options, x[0], layer)
    np.testing.assert_allclose(made(jnp.asarray(x), PLACES, memory(), layer)[0][0], expected, rtol=1e-4, atol=1e-5)
    if not isinstance(memory(), Paged):  # the engine's layers are never traced
        np.testing.assert_allclose(traced(state, x, layer)[0], expected, rtol=1e-4, atol=1e-5)


def test_windows_and_chunks_start_anew_in_each_document():
    made = attention({"chunk": 3})
    _, x = drawn(made)
    ids, places = jnp.asarray([[1, 1, 2, 2, 2, 2, 2]]), jnp.asarray([[0, 1, 0, 1, 2, 3, 4]])
    packed, _ = made(jnp.asarray(x), places, Packed.of(ids), 0)
    alone, _ = made(jnp.asarray(x[:, 2:]), places[:, 2:], Packed.of(ids[:, 2:]), 0)
    np.testing.assert_allclose(packed[0, 2:], alone[0], rtol=1e-5, atol=1e-6)


def test_sinks_learn():
    draw = np.random.default_rng(0)
    q, k, v = (jnp.asarray(draw.normal(size=(1, TIME, n, HEAD_DIM)), jnp.float32) for n in (HEADS, KV_HEADS, KV_HEADS))
    memory, reach = Packed.of(jnp.ones((1, TIME), jnp.int32)), jnp.full((1, TIME), 2)

    def found(q, sinks):
        return memory.attend(0, q, k, v, reach=reach, sinks=sinks)[0]

    check_grads(found, (q, jnp.asarray(draw.normal(size=HEADS), jnp.float32)), order=1, modes=["rev"], rtol=1e-2)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"window": 0}, "window = 0: must be 1 or more"),
        ({"full_every": 4}, "full_every = 4 without window or chunk: all layers are full; set one"),
    ],
)
def test_what_can_not_be_is_said(options, said):
    with pytest.raises(BadInput, match=said):
        attention(options)


def test_options_that_are_off_add_no_parameter_and_draw_no_key():
    plain, full = (nnx.to_pure_dict(nnx.state(Attention(WIDTH, HEADS, KV_HEADS, HEAD_DIM, rngs=nnx.Rngs(3), **options)))
                   for options in ({}, OPTIONS["all"]))  # fmt: skip
    assert sorted(plain) == ["w_k", "w_o", "w_q", "w_v"]
    jax.tree.map(np.testing.assert_array_equal, plain, {name: full[name] for name in plain})
