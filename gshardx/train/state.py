"""Everything that a step reads and writes."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int, UInt32

from gshardx.layers import RouterState
from gshardx.models.build import Blueprint, Params, Variables


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """params and opt_state as their places on the mesh say; step int32; rng raw key data, folded with step."""

    step: Int[Array, ""]
    params: Params
    opt_state: Any
    rng: UInt32[Array, "2"]
    router: RouterState
    """Of all MoE layers, stacked."""
    balance_weight: Float[Array, "layer"]
    """Of each MoE layer's balance loss."""
    skipped: Int[Array, ""]
    """Steps that changed nothing, since their gradients were not finite."""

    @property
    def variables(self) -> Variables:
        return Variables(self.params, self.router)


def whole_over_fsdp(params: Params) -> Params:
    """Abstract ``params`` without mesh axis ``fsdp`` in any dimension: where ZeRO stages 1 and 2 keep them."""

    def place(array: Any) -> Any:
        spec = [
            tuple(axis for axis in (entry if isinstance(entry, tuple) else (entry,)) if axis not in ("fsdp", None))
            for entry in array.sharding.spec
        ]
        sharding = NamedSharding(array.sharding.mesh, PartitionSpec(*(axes or None for axes in spec)))
        return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)

    return jax.tree.map(place, params)


def init_state(
    blueprint: Blueprint,
    optimizer: optax.GradientTransformation,
    seed: int,
    mesh: Mesh,
    split: Params | None = None,
) -> TrainState:
    """Step 0, every array created in its shards; ``split`` as in :func:`abstract_state`."""
    abstract = abstract_state(blueprint, optimizer, mesh, split)
    shardings = jax.tree.map(lambda a: a.sharding, abstract)
    init_key, run_key = jax.random.split(jax.random.key(seed))
    # Waited for: two programs in flight can starve each other on simulated devices.
    params = jax.block_until_ready(blueprint.init(init_key))

    def rest(params: Params) -> tuple[Any, Array, Array, Array]:
        return optimizer.init(params), jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32), jax.random.key_data(run_key)

    places = (shardings.opt_state, shardings.step, shardings.skipped, shardings.rng)
    opt_state, step, skipped, rng = jax.jit(rest, out_shardings=places)(params)
    weight = np.full(abstract.balance_weight.shape, blueprint.config.moe.losses.get("balance", 0.0), np.float32)
    balance_weight = jax.device_put(weight, shardings.balance_weight)
    router = blueprint.init_router()
    return jax.block_until_ready(TrainState(step, params, opt_state, rng, router, balance_weight, skipped))


def abstract_state(
    blueprint: Blueprint, optimizer: optax.GradientTransformation, mesh: Mesh, split: Params | None = None
) -> TrainState:
    """Shapes, dtypes and shardings of a state: counters live everywhere, parameters where the blueprint says, moments
    where ``split`` has their parameter (default: with the parameter)."""
    config, everywhere = blueprint.config, NamedSharding(mesh, PartitionSpec())

    def place(array: Any, sharding: NamedSharding) -> Any:
        return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)

    opt_state = optax.tree_utils.tree_map_params(
        optimizer,
        lambda array, param: place(array, param.sharding),
        jax.eval_shape(optimizer.init, blueprint.params),
        blueprint.params if split is None else split,
        transform_non_params=lambda array: place(array, everywhere),
    )
    return TrainState(
        step=place(np.zeros((), np.int32), everywhere),
        params=blueprint.params,
        opt_state=opt_state,
        rng=place(np.zeros(2, np.uint32), everywhere),
        router=blueprint.router,
        balance_weight=place(np.zeros(config.layers // config.moe.every, np.float32), everywhere),
        skipped=place(np.zeros((), np.int32), everywhere),
    )
