"""The MoE layer: every dispatcher against the loops, every router on every mesh."""

import dataclasses
import itertools
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gshardx.errors import BadInput
from gshardx.layers import (
    AdaMoERouter,
    BaseRouter,
    Blending,
    Capacity,
    CosineRouter,
    DemixRouter,
    DselectKRouter,
    DsMoeRouter,
    DynMoERouter,
    Einsum,
    ExpertChoiceRouter,
    Experts,
    FeedForward,
    GatedShared,
    Gather,
    GShardRouter,
    HashRouter,
    LoryRouter,
    MeoRouter,
    Mixing,
    MoE,
    MoePlusPlusRouter,
    NoisyTopKRouter,
    QuantileRouter,
    Ragged,
    ReluRouter,
    Residual,
    SentenceRouter,
    Shared,
    SigmoidBiasRouter,
    SinkhornRouter,
    SkyworkRouter,
    SmearRouter,
    SmoeDropoutRouter,
    SoftMoERouter,
    SparseMixerRouter,
    StableRouter,
    SwitchRouter,
    TaskRouter,
    TopKRouter,
    kinds_of,
)
from gshardx.layers.shared import nothing
from gshardx.sharding import MeshConfig, build_mesh
from tests.oracles import gshard as oracle

G, S, M, H, E, K = 8, 16, 8, 12, 8, 2
IDS = np.random.default_rng(0).integers(0, 100, (G, S)).astype(np.int32)
TIGHT, DROPLESS = Capacity(0.75), Capacity(None)
ROUTERS = {
    "gshard": partial(GShardRouter, M, E, K, "random", capacity=TIGHT),
    "switch": partial(SwitchRouter, M, E, capacity=TIGHT),
    "top_k": partial(TopKRouter, M, E, 3, groups=4, groups_kept=2, bias=True, capacity=TIGHT, priority="gate"),
    "sigmoid_bias": partial(SigmoidBiasRouter, M, E, K, groups=4, groups_kept=2, weigh="input", capacity=DROPLESS),
    "noisy_top_k": partial(NoisyTopKRouter, M, E, K, capacity=TIGHT),
    "dynmoe": partial(DynMoERouter, M, E, 4, initial=6, capacity=TIGHT),
    "adamoe": partial(AdaMoERouter, M, E, 3, null_experts=4, capacity=TIGHT),
    "cosine": partial(CosineRouter, M, E, K, projection=M, capacity=TIGHT),
    "relu": partial(ReluRouter, M, E, K, most=3, capacity=TIGHT),
    "smoe_dropout": partial(SmoeDropoutRouter, M, E, 3, fewest=2, capacity=TIGHT),
    "ds_moe": partial(DsMoeRouter, M, E, K, capacity=TIGHT),
    "dselect_k": partial(DselectKRouter, M, E, K, most=3, capacity=TIGHT),
    "skywork": partial(SkyworkRouter, M, E, K, capacity=TIGHT),
    "expert_choice": partial(ExpertChoiceRouter, M, E, K),
    "hash": partial(HashRouter, M, E, K, capacity=TIGHT),
    "base": partial(BaseRouter, M, E, capacity=Capacity(0.5)),
    "sinkhorn": partial(SinkhornRouter, M, E, K, capacity=TIGHT),
    "quantile": partial(QuantileRouter, M, E, K, capacity=TIGHT),
    "sentence": partial(SentenceRouter, M, E, K, capacity=TIGHT),
    "task": partial(TaskRouter, M, E, K, tags=list(range(M - 1)), capacity=TIGHT),
    "demix": partial(DemixRouter, M, E, tags=list(range(E)), capacity=TIGHT),
    "sparse_mixer": partial(SparseMixerRouter, M, E, K, jitter=0.4, capacity=TIGHT),
    "soft_moe": partial(SoftMoERouter, M, E, slots=3),
    "stable": partial(StableRouter, M, E, dimension=4, vocab=100, capacity=TIGHT),
    "moe_pp": partial(MoePlusPlusRouter, M, E, 3, capacity=TIGHT),
}
MERGING = {
    "smear": partial(SmearRouter, M, E, expert_dropout=0.3),
    "lory": partial(LoryRouter, M, E, segment=4),
    "meo": partial(MeoRouter, M, E, K),
}
DISPATCHERS = [Einsum(), Gather(), Ragged("padded")]
MIXING = [Einsum(), Mixing(), Mixing()]
"""Instead of those, for a router that mixes tokens."""
BESIDE = {
    "nothing": lambda rngs: nothing,
    "shared": lambda rngs: Shared(FeedForward(M, 6, "geglu", rngs=rngs)),
    "gated": lambda rngs: GatedShared(M, FeedForward(M, 6, "swiglu", rngs=rngs), rngs=rngs),
    "residual": lambda rngs: Residual(M, FeedForward(M, 6, "gelu", rngs=rngs), rngs=rngs),
}


def dispatchers(router):
    return MIXING if router == "soft_moe" else DISPATCHERS


def layer(dispatcher, router="gshard", activation="swiglu", biases=False, beside="nothing", **router_options):
    rngs = nnx.Rngs(0)
    made = {**ROUTERS, **MERGING}[router](**router_options, rngs=rngs)
    # relu: its weights are logits, and large ones large angles for the sine. smear: what dropout leaves of a sharp
    # mixture may be little, and dividing by it makes rounding large.
    scale = 0.2 if router in ("relu", "smear") else 1.0
    if hasattr(made, "kernel"):
        made.kernel.set_value(scale * jax.random.normal(jax.random.key(1), made.kernel.shape))
    experts = Experts(E, M, H, activation, biases=biases, rngs=rngs)
    for name in ("b_up", "b_gate", "b_down"):
        bias = getattr(experts, name, None)
        if bias is not None:
            bias.set_value(jax.random.normal(jax.random.key(len(name)), bias.shape))
    return MoE(made, dispatcher, experts, BESIDE[beside](rngs), kinds=kinds_of(made, M, rngs=rngs))


def inputs():
    x = jax.random.normal(jax.random.key(2), (G, S, M))
    return x, jnp.arange(S)[None] < jnp.asarray([S, S, S, S, 11, 5, 1, 0])[:, None]


def loss_and_gradients(moe):
    """A function of (params, x) and the params; its value holds output, losses, statistics and state."""
    graph, params = nnx.split(moe, nnx.Param)
    _, valid = inputs()

    def loss(params, x):
        out, metrics = nnx.merge(graph, params)(x, valid, jax.random.key(0), moe.router.initial_state(), IDS)
        return jnp.sum(jnp.sin(out)) + 0.1 * metrics.losses["balance"] + 0.01 * metrics.losses["z"], (out, metrics)

    return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True), params


def assert_equal(actual, expected, atol):
    def check(a, b):
        a, b = np.asarray(a), np.asarray(b)
        rounding = 1e-6 * np.abs(b).max(initial=0) if a.dtype.kind == "f" else 0  # of sums whose parts cancel out
        np.testing.assert_allclose(a, b, atol=max(atol, rounding), rtol=1e-5 if a.dtype.kind == "f" else 0)

    jax.tree.map(check, actual, expected)


@pytest.mark.parametrize("dispatcher", DISPATCHERS, ids=lambda d: type(d).__name__)
@pytest.mark.parametrize(("activation", "biases"), [("swiglu", False), ("relu", True)])
@pytest.mark.parametrize("capacity_factor", [0.25, 4.0])
def test_equals_one_token_at_a_time(dispatcher, activation, biases, capacity_factor):
    moe = layer(dispatcher, "top_k", activation, biases, capacity=Capacity(capacity_factor))
    x, valid = inputs()
    out, metrics = jax.jit(moe)(x, valid, jax.random.key(0))
    routing = moe.router(x, valid, jax.random.key(0))
    weights = {name: np.asarray(getattr(moe.experts, name)[...]) for name in ("w_up", "w_down")}
    gate = None if activation == "relu" else np.asarray(moe.experts.w_gate[...])
    b_up, b_down = (np.asarray(b[...]) if biases else np.zeros((E, 1)) for b in _biases(moe.experts))

    def feed_forward(expert, token):
        up = token @ weights["w_up"][expert] + b_up[expert]
        hidden = np.maximum(up, 0) if gate is None else up * _silu(token @ gate[expert])
        return hidden @ weights["w_down"][expert] + b_down[expert]

    for g in range(G):
        keep = np.asarray(routing.keep[g])
        expected = oracle.moe(np.asarray(x[g]), np.asarray(routing.experts[g]), keep, routing.weights[g], feed_forward)
        np.testing.assert_allclose(out[g], expected, atol=2e-5)
    dropped = 1 - np.asarray(routing.keep).sum() / (3 * np.asarray(valid).sum())
    assert float(metrics.stats.drop_fraction) == pytest.approx(dropped, abs=1e-6)
    assert (dropped > 0) == (capacity_factor < 1)


def _biases(experts):
    return getattr(experts, "b_up", None), experts.b_down


def _silu(x):
    return x / (1 + np.exp(-x))


@pytest.mark.parametrize("router", ROUTERS)
def test_dispatchers_agree_in_value_and_gradient(router):
    results = []
    for dispatcher in dict.fromkeys(dispatchers(router)):
        step, params = loss_and_gradients(layer(dispatcher, router, "clamped_swiglu", biases=True))
        results.append(jax.jit(step)(params, inputs()[0]))
    for other in results[1:]:
        assert_equal(other, results[0], 3e-6)
    stats = results[0][0][1][1].stats
    assert (float(stats.drop_fraction) > 0) == (router not in ("sigmoid_bias", "expert_choice", "soft_moe"))


def test_dispatchers_agree_to_the_bit_where_a_token_is_one_row_and_no_sum():
    x, valid = inputs()
    gather, einsum = (jax.jit(layer(d, "switch"))(x, valid, jax.random.key(0))[0] for d in (Gather(), Einsum()))
    np.testing.assert_array_equal(gather, einsum)


MESHES = (
    MeshConfig(data=2, expert=2, tensor=2),
    MeshConfig(expert=2),
    MeshConfig(data=2, tensor=2),
    MeshConfig(expert=8),
    MeshConfig(fsdp=4, expert=2),
    MeshConfig(tensor=4, fsdp=2),
    MeshConfig(data=2, fsdp=2, expert=2),
)
ON_MESHES = [
    (mesh, router, dispatchers(router)[(m + r) % len(DISPATCHERS)])
    for (m, mesh), (r, router) in itertools.product(enumerate(MESHES), enumerate(ROUTERS))
]
"""Every router on every mesh, the dispatchers in turn: a router meets all of them, and so does a mesh."""
MERGED_ON_MESHES = [(mesh, router, Blending()) for mesh, router in itertools.product(MESHES, MERGING)]


@cache
def on_one_device(router, dispatcher):
    step, params = loss_and_gradients(layer(dispatcher, router, biases=True, beside="gated"))
    return jax.jit(step)(params, inputs()[0])


@pytest.mark.parametrize(
    ("mesh_config", "router", "dispatcher"),
    [
        pytest.param(*case, marks=pytest.mark.slow if case[0] == MESHES[0] else pytest.mark.sweep)
        for case in (*ON_MESHES, *MERGED_ON_MESHES)
    ],
    ids=lambda value: str(value) if isinstance(value, str | MeshConfig) else type(value).__name__,
)
def test_every_router_gives_on_every_mesh_what_one_device_gives(mesh_config, router, dispatcher):
    """A program each: XLA takes longer for one of all routers."""
    step, params = loss_and_gradients(layer(dispatcher, router, biases=True, beside="gated"))
    with jax.set_mesh(build_mesh(mesh_config)):
        actual = jax.block_until_ready(jax.jit(step)(params, inputs()[0]))
    assert_equal(actual, on_one_device(router, dispatcher), 1e-5)


def test_every_router_and_every_mesh_meets_every_dispatcher():
    kinds = {type(dispatcher) for dispatcher in DISPATCHERS}
    assert {(mesh, router) for mesh, router, _ in ON_MESHES} == set(itertools.product(MESHES, ROUTERS))
    assert {(router, d) for _, router, d in ON_MESHES} == {(r, d) for r in ROUTERS for d in dispatchers(r)}
    assert {(mesh, type(d)) for mesh, _, d in ON_MESHES} >= set(itertools.product(MESHES, kinds))


@pytest.mark.parametrize("router", ["gshard", "sigmoid_bias"])
def test_eight_devices_give_what_one_gives(router):
    step, params = loss_and_gradients(layer(Gather(), router))
    expected = jax.jit(step)(params, inputs()[0])
    with jax.set_mesh(build_mesh(MeshConfig(data=2, expert=2, tensor=2))):
        actual = jax.block_until_ready(jax.jit(step)(params, inputs()[0]))
    assert_equal(actual, expected, 1e-5)


@pytest.mark.parametrize("dispatcher", DISPATCHERS, ids=lambda d: type(d).__name__)
def test_padding_returns_zero_and_changes_no_other_token(dispatcher):
    moe = layer(dispatcher)
    x, valid = inputs()
    run = jax.jit(moe)
    out, metrics = run(x, valid, jax.random.key(0))
    np.testing.assert_array_equal(out[~np.asarray(valid)], 0.0)
    other, same = run(jnp.where(valid[..., None], x, 99.0), valid, jax.random.key(0))
    np.testing.assert_array_equal(out, other)
    assert_equal(metrics._replace(experts=0), same._replace(experts=0), 0)


@pytest.mark.parametrize(
    ("router", "dispatcher"),
    [
        *((router, dispatchers(router)[1]) for router in ROUTERS),
        *(("gshard", Ragged()), ("smear", Blending()), ("meo", Blending())),
    ],
    ids=str,
)
def test_inference_is_causal_to_the_bit_and_drops_nothing(router, dispatcher):
    """But for routers that say why they are not."""
    moe = layer(dispatcher, router)
    x, _ = inputs()
    everyone = jnp.ones((G, S), bool)
    run = jax.jit(lambda x: moe(x, everyone, None, moe.router.initial_state(), IDS))
    out, metrics = run(x)
    assert float(metrics.stats.drop_fraction) == 0.0
    changed, _ = run(x.at[:, 5:].set(0.0))
    assert (np.asarray(out[:, :5]) == np.asarray(changed[:, :5])).all() == (moe.router.leak is None)
    assert np.abs(np.asarray(out - changed)).max() > 1e-3


@pytest.mark.parametrize("dispatcher", DISPATCHERS, ids=lambda d: type(d).__name__)
def test_outputs_are_masked_in_training_alone(dispatcher):
    """With one choice a token has none of its output, or all of it and as much more as others lack."""
    whole, masked = (layer(dispatcher, "switch", output_masking=share, jitter=0.0) for share in (0.0, 0.25))
    x, valid = inputs()
    (out, _), (other, _) = (jax.jit(moe)(x, valid, jax.random.key(0)) for moe in (whole, masked))
    there = np.abs(np.asarray(out)).max(-1) > 0
    left = np.abs(np.asarray(other)).max(-1) > 0
    assert 0.1 < 1 - left[there].mean() < 0.4
    np.testing.assert_allclose(np.asarray(other)[left], np.asarray(out)[left] / 0.75, rtol=1e-5, atol=1e-6)
    (out, _), (other, _) = (jax.jit(moe)(x, valid, None) for moe in (whole, masked))
    np.testing.assert_array_equal(out, other)


@pytest.mark.parametrize("dispatcher", DISPATCHERS, ids=lambda d: type(d).__name__)
def test_tokens_are_left_out_in_training_alone_and_count_nowhere(dispatcher):
    whole, fewer = (layer(dispatcher, "top_k", token_drop=share, capacity=DROPLESS) for share in (0.0, 0.25))
    x, valid = inputs()
    (out, _), (other, metrics) = (jax.jit(moe)(x, valid, jax.random.key(0)) for moe in (whole, fewer))
    left = np.asarray(metrics.kept).any(-1)
    assert 0.15 < 1 - left.sum() / np.asarray(valid).sum() < 0.35
    np.testing.assert_array_equal(np.asarray(other)[~left], 0.0)
    np.testing.assert_allclose(np.asarray(other)[left], np.asarray(out)[left], atol=1e-6)
    assert float(metrics.stats.tokens) == left.sum()
    alone = jax.jit(whole)(x, jnp.asarray(left), jax.random.key(0))[1]
    assert_equal((metrics.losses, metrics.stats), (alone.losses, alone.stats), 1e-6)
    (out, _), (other, _) = (jax.jit(moe)(x, valid, None) for moe in (whole, fewer))
    np.testing.assert_array_equal(out, other)


def test_a_share_of_dropped_tokens_is_below_one():
    with pytest.raises(BadInput, match=r"token_drop = 1.0: must be .* below 1"):
        layer(Gather(), token_drop=1.0)


def test_a_share_of_masked_outputs_is_below_one():
    with pytest.raises(BadInput, match=r"output_masking = .*; NLLB has"):
        layer(Gather(), output_masking=1.0)


def test_groups_of_another_size_compete_among_themselves():
    moe = layer(Gather(), capacity=Capacity(0.5))
    moe.group_size = 4
    x, valid = inputs()
    run = jax.jit(moe)
    out, _ = run(x, valid, jax.random.key(0))
    swapped, _ = run(x.at[:, 4:8].set(x[:, 8:12]), valid, jax.random.key(0))
    np.testing.assert_array_equal(out[:, :4], swapped[:, :4])


def test_shared_experts_join_as_their_formulas_say():
    x, valid = inputs()
    routed, _ = jax.jit(layer(Gather()))(x, valid, jax.random.key(0))
    for name in ("shared", "gated", "residual"):
        moe = layer(Gather(), beside=name)
        out, _ = jax.jit(moe)(x, valid, jax.random.key(0))
        dense, by_hand = moe.beside.feed_forward(x), None
        if name == "shared":
            by_hand = routed + dense
        elif name == "gated":
            by_hand = routed + dense / (1 + np.exp(-np.asarray(x @ moe.beside.gate[...])))[..., None]
        else:
            c = np.exp(np.asarray(x @ moe.beside.kernel[...] + moe.beside.bias[...]))
            c /= c.sum(-1, keepdims=True)
            by_hand = c[..., :1] * routed + c[..., 1:] * dense
        np.testing.assert_allclose(out, by_hand, atol=1e-5)
        assert float(jnp.abs(dense).max()) > 0.01


@pytest.mark.slow
@pytest.mark.parametrize("kind", [Gather, Einsum, partial(Ragged, "padded")], ids=["gather", "einsum", "ragged"])
def test_bfloat16_on_the_wire_rounds_what_travels_and_nothing_else(kind):
    x, valid = inputs()

    def out(wire, mesh_config):
        with jax.set_mesh(build_mesh(mesh_config)):
            return jax.block_until_ready(jax.jit(layer(kind(wire=wire)))(x, valid, jax.random.key(0))[0])

    exact, rounded = (out(wire, MeshConfig(expert=8)) for wire in (None, jnp.bfloat16))
    assert rounded.dtype == jnp.float32
    assert 1e-5 < float(jnp.abs(rounded - exact).max()) < 0.05
    np.testing.assert_array_equal(out(jnp.bfloat16, MeshConfig(data=8)), out(None, MeshConfig(data=8)))


def test_groups_that_do_not_divide_the_tokens_are_named():
    moe = layer(Gather())
    moe.group_size = 7
    with pytest.raises(BadInput, match=r"x \[8, 16, 8\]: group_size = 7 does not divide its 128 tokens"):
        moe(*inputs(), jax.random.key(0))


def test_a_layer_is_a_value_that_can_be_compared_and_split():
    first, second = (nnx.split(layer(Gather()), nnx.Param)[0] for _ in range(2))
    assert hash(first) == hash(second)
    assert first == second
    assert dataclasses.replace(Gather(), wire=jnp.bfloat16) != Gather()
