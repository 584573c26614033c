"""The MoE layer: both dispatchers against the loops, on one device and on every mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gshardx.layers import Einsum, Experts, Gather, GShardRouter, MoE, expert_capacity
from gshardx.sharding import MeshConfig, build_mesh
from tests.oracles import gshard as oracle

G, S, M, H, E, K = 8, 16, 8, 12, 8, 2
MESHES = [
    MeshConfig(expert=8),
    MeshConfig(data=2, expert=4),
    MeshConfig(fsdp=4, expert=2),
    MeshConfig(data=2, expert=2, tensor=2),
    MeshConfig(data=8),
    MeshConfig(tensor=4, fsdp=2),
]


def layer(dispatcher, activation="swiglu", capacity_factor=1.0):
    rngs = nnx.Rngs(0)
    router = GShardRouter(M, E, K, rngs=rngs)
    router.kernel.set_value(jax.random.normal(jax.random.key(1), (M, E)))
    experts = Experts(E, M, H, activation, rngs=rngs)
    return MoE(router, dispatcher, experts, num_experts=E, top_k=K, capacity_factor=capacity_factor)


def inputs():
    x = jax.random.normal(jax.random.key(2), (G, S, M))
    return x, jnp.arange(S)[None] < jnp.asarray([S, S, S, S, 11, 5, 1, 0])[:, None]


def loss_and_gradients(moe):
    graph, params = nnx.split(moe, nnx.Param)

    def loss(params, x, valid, rng):
        out, metrics = nnx.merge(graph, params)(x, valid, rng)
        return jnp.sum(jnp.sin(out)) + 0.1 * metrics.aux_loss, (out, metrics)

    return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True), params


@pytest.mark.parametrize("dispatcher", [Einsum(), Gather()])
@pytest.mark.parametrize("activation", ["swiglu", "relu"])
@pytest.mark.parametrize("capacity_factor", [0.25, 4.0])
def test_equals_one_token_at_a_time(dispatcher, activation, capacity_factor):
    moe = layer(dispatcher, activation, capacity_factor)
    x, valid = inputs()
    out, metrics = moe(x, valid, jax.random.key(0))
    capacity = expert_capacity(S, E, K, capacity_factor)
    routing = moe.router(x, valid, None, capacity)
    w_up, w_down = np.asarray(moe.experts.w_up[...]), np.asarray(moe.experts.w_down[...])

    def feed_forward(expert, token):
        up = token @ w_up[expert]
        if activation == "relu":
            return np.maximum(up, 0) @ w_down[expert]
        gate = token @ np.asarray(moe.experts.w_gate[...])[expert]
        return (gate / (1 + np.exp(-gate)) * up) @ w_down[expert]

    for g in range(G):
        keep = np.asarray(routing.keep[g])
        expected = oracle.moe(np.asarray(x[g]), np.asarray(routing.experts[g]), keep, routing.weights[g], feed_forward)
        np.testing.assert_allclose(out[g], expected, atol=1e-5)
    dropped = 1 - np.asarray(routing.keep).sum() / (K * np.asarray(valid).sum())
    assert float(metrics.stats.drop_fraction) == pytest.approx(dropped, abs=1e-6)
    assert (dropped > 0) == (capacity_factor < 1)


def test_dispatchers_agree_in_value_and_gradient():
    x, valid = inputs()
    results = []
    for dispatcher in (Einsum(), Gather()):
        step, params = loss_and_gradients(layer(dispatcher))
        results.append(step(params, x, valid, jax.random.key(0)))
    (_, (out, _)), gradients = results[0]
    (_, (other, _)), others = results[1]
    np.testing.assert_allclose(out, other, atol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), gradients, others)


@pytest.mark.parametrize("dispatcher", [Einsum(), Gather()])
@pytest.mark.parametrize("mesh_config", MESHES, ids=str)
def test_every_mesh_gives_what_one_device_gives(dispatcher, mesh_config):
    x, valid = inputs()
    step, params = loss_and_gradients(layer(dispatcher))
    expected = step(params, x, valid, jax.random.key(0))
    with jax.set_mesh(build_mesh(mesh_config)):
        actual = jax.block_until_ready(jax.jit(step)(params, x, valid, jax.random.key(0)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), actual, expected)


def test_padding_returns_zero_and_changes_no_other_token():
    moe = layer(Gather())
    x, valid = inputs()
    out, _ = moe(x, valid, jax.random.key(0))
    np.testing.assert_array_equal(out[~np.asarray(valid)], 0.0)
    other, _ = moe(jnp.where(valid[..., None], x, 99.0), valid, jax.random.key(0))
    np.testing.assert_array_equal(out, other)


def test_inference_drops_nothing_and_depends_on_no_other_token():
    moe = layer(Gather(), capacity_factor=0.25)
    x, _ = inputs()
    everyone = jnp.ones((G, S), bool)
    out, metrics = moe(x, everyone, None)
    assert float(metrics.stats.drop_fraction) == 0.0
    changed, _ = moe(x.at[:, 5:].set(0.0), everyone, None)
    np.testing.assert_array_equal(out[:, :5], changed[:, :5])
    trained, _ = moe(x, everyone, jax.random.key(0))
    assert float(jnp.abs(trained - out).max()) > 1e-3, "a quarter of the room must have dropped something"


def test_groups_of_another_size_compete_among_themselves():
    moe = layer(Gather(), capacity_factor=0.5)
    moe.group_size = 4
    x, valid = inputs()
    out, _ = moe(x, valid, jax.random.key(0))
    swapped, _ = moe(x.at[:, 4:8].set(x[:, 8:12]), valid, jax.random.key(0))
    np.testing.assert_array_equal(out[:, :4], swapped[:, :4])


@pytest.mark.parametrize(
    ("s", "e", "k", "factor", "slots"),
    [(1024, 512, 2, 1.0, 4), (8, 8, 2, 1.25, 3), (1, 64, 8, 1.0, 1), (4, 2, 2, 9.0, 4)],
)
def test_capacity_follows_the_paper_within_sense(s, e, k, factor, slots):
    assert expert_capacity(s, e, k, factor) == slots
