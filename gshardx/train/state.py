"""Everything that a step reads and writes."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int, UInt32

from gshardx.models.build import Blueprint, Params


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """params and opt_state as their places on the mesh say; step int32; rng raw key data, folded with step."""

    step: Int[Array, ""]
    params: Params
    opt_state: Any
    rng: UInt32[Array, "2"]


def init_state(blueprint: Blueprint, optimizer: optax.GradientTransformation, seed: int, mesh: Mesh) -> TrainState:
    """Step 0, every array created in its shards."""
    shardings = jax.tree.map(lambda a: a.sharding, abstract_state(blueprint, optimizer, mesh))
    init_key, run_key = jax.random.split(jax.random.key(seed))
    # Waited for: two programs in flight can starve each other on simulated devices.
    params = jax.block_until_ready(blueprint.init(init_key))

    def rest(params: Params) -> tuple[Any, Array, Array]:
        return optimizer.init(params), jnp.zeros((), jnp.int32), jax.random.key_data(run_key)

    opt_state, step, rng = jax.jit(rest, out_shardings=(shardings.opt_state, shardings.step, shardings.rng))(params)
    return jax.block_until_ready(TrainState(step, params, opt_state, rng))


def abstract_state(blueprint: Blueprint, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """Shapes, dtypes and shardings of a state: moments live where their parameter lives, counters everywhere."""
    everywhere = NamedSharding(mesh, PartitionSpec())

    def place(array: Any, sharding: NamedSharding) -> Any:
        return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)

    opt_state = optax.tree_utils.tree_map_params(
        optimizer,
        lambda array, param: place(array, param.sharding),
        jax.eval_shape(optimizer.init, blueprint.params),
        blueprint.params,
        transform_non_params=lambda array: place(array, everywhere),
    )
    return TrainState(
        step=place(np.zeros((), np.int32), everywhere),
        params=blueprint.params,
        opt_state=opt_state,
        rng=place(np.zeros(2, np.uint32), everywhere),
    )
