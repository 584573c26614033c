"""A gshardx MoE layer inside an Equinox model, sharded over 8 devices."""

from gshardx.sharding import MeshConfig, build_mesh, simulate_devices

simulate_devices(8)  # CPUs only; accelerators are not affected

import equinox as eqx  # noqa: E402
import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from flax import nnx  # noqa: E402

from gshardx.layers import Experts, Gather, MoE, SigmoidBiasRouter  # noqa: E402


class Model(eqx.Module):
    moe: nnx.State
    graph: nnx.GraphDef = eqx.field(static=True)
    head: eqx.nn.Linear

    def __init__(self, key):
        rngs = nnx.Rngs(key)
        router, experts = SigmoidBiasRouter(64, 8, top_k=2, rngs=rngs), Experts(8, 64, 128, "swiglu", rngs=rngs)
        self.graph, self.moe = nnx.split(MoE(router, Gather(), experts), nnx.Param)
        self.head = eqx.nn.Linear(64, 1, key=key)

    def __call__(self, x, rng, state):
        hidden, metrics = nnx.merge(self.graph, self.moe)(x, jnp.ones(x.shape[:2], bool), rng, state)
        return jax.vmap(jax.vmap(self.head))(x + hidden), metrics


x, model = jax.random.normal(jax.random.key(1), (16, 32, 64)), Model(jax.random.key(0))
router = nnx.merge(model.graph, model.moe).router
state = router.initial_state()  # the bias that balances the experts; no gradient sees it
with jax.set_mesh(build_mesh(MeshConfig(data=2, expert=4))):
    for step in range(3):
        y, metrics = eqx.filter_jit(Model.__call__)(model, x, jax.random.key(step), state)
        state = router.after_step(metrics.state)
print(y.shape, "bias after three steps:", state.bias)
