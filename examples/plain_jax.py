"""A gshardx MoE layer in a model of plain JAX functions, sharded over 8 devices: one step of gradient descent."""

from gshardx.sharding import MeshConfig, build_mesh, simulate_devices

simulate_devices(8)  # CPUs only; accelerators are not affected

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from flax import nnx  # noqa: E402

from gshardx.layers import Capacity, Experts, Gather, GShardRouter, MoE, param_shardings  # noqa: E402

WIDTH, EXPERTS = 64, 8
mesh = build_mesh(MeshConfig(data=2, expert=4))
rngs = nnx.Rngs(0)
layer = MoE(
    GShardRouter(WIDTH, EXPERTS, top_k=2, capacity=Capacity(1.25), rngs=rngs),
    Gather(),
    Experts(EXPERTS, WIDTH, 256, "swiglu", rngs=rngs),
)
graph, moe = nnx.split(layer, nnx.Param)  # moe is a pytree of parameters
params = {"moe": jax.device_put(moe, param_shardings(moe, mesh)), "head": jnp.zeros((WIDTH, 1))}


def loss(params, x, y, rng):
    hidden, metrics = nnx.merge(graph, params["moe"])(x, jnp.ones(x.shape[:2], bool), rng)
    error = (x + hidden) @ params["head"] - y
    return jnp.mean(error**2) + 0.01 * metrics.losses["balance"], metrics.stats.drop_fraction


x = jax.random.normal(jax.random.key(1), (16, 32, WIDTH))  # batch, time, model
with jax.set_mesh(mesh):
    step = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (value, dropped), gradient = step(params, x, x[..., :1], jax.random.key(2))
params = jax.tree.map(lambda p, g: p - 0.1 * g, params, gradient)
print(
    f"loss {value:.3f}, dropped {dropped:.1%}, experts on {params['moe']['experts']['w_up'].get_value().sharding.spec}"
)
