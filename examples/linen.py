"""A gshardx MoE layer inside a Flax Linen model (through nnx.bridge), sharded over 8 devices."""

from gshardx.sharding import MeshConfig, build_mesh, simulate_devices

simulate_devices(8)  # CPUs only; accelerators are not affected

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from flax import linen, nnx  # noqa: E402

from gshardx.layers import Experts, Gather, MoE, TopKRouter  # noqa: E402

WIDTH, EXPERTS = 64, 8


def make_moe(rngs):
    router = TopKRouter(WIDTH, EXPERTS, top_k=2, rngs=rngs)
    return MoE(router, Gather(), Experts(EXPERTS, WIDTH, 128, "swiglu", rngs=rngs))


class Model(linen.Module):
    @linen.compact
    def __call__(self, x, valid, rng):
        x = linen.Dense(WIDTH)(x)
        hidden, metrics = nnx.bridge.to_linen(make_moe, name="moe")(x, valid, rng)
        return linen.Dense(1)(x + hidden), metrics


model, x = Model(), jax.random.normal(jax.random.key(1), (16, 32, 8))
valid = jnp.ones((16, 32), bool)  # False for padding
with jax.set_mesh(build_mesh(MeshConfig(expert=8))):
    variables = jax.jit(model.init)(jax.random.key(0), x, valid, None)
    y, metrics = jax.jit(model.apply)(variables, x, valid, jax.random.key(2))
print(y.shape, f"balance {metrics.losses['balance']:.3f}, dropped {metrics.stats.drop_fraction:.1%}")
