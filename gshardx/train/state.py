"""Everything that a step reads and writes."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int, UInt32

from gshardx.layers import RouterState
from gshardx.models.build import Blueprint, Params, Variables
from gshardx.sharding.axes import entries_of


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
    rollbacks: Int[Array, ""]
    """Times that the run went back to a checkpoint after a spike."""
    ema: Params = dataclasses.field(default_factory=dict)
    """Average of the parameters over the steps (:func:`averaged`), fp32; empty without ``optimizer.ema_decay``."""

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


def averaged(ema: Params, params: Params, decay: float, step: Int[Array, ""]) -> Params:
    """The average after ``step`` (from 1) left ``params``: each step's weights count ``decay`` times the next one's.

    Divided by the sum of these factors, so that the weights before the first step have no part in it (Adam's
    correction, arXiv 1412.6980 section 3, here kept in the average itself).
    """
    share = (1.0 - decay) / -jnp.expm1(step * math.log(decay))
    return jax.tree.map(lambda mean, new: mean + share * (new - mean), ema, params)


def init_state(
    blueprint: Blueprint,
    optimizer: optax.GradientTransformation,
    seed: int,
    mesh: Mesh,
    split: Params | None = None,
    average: bool = False,
    variables: Variables | None = None,
) -> TrainState:
    """Step 0, every array created in its shards; ``split`` and ``average`` as in :func:`abstract_state`.

    ``variables``: to start from, in their places; default: new ones.
    """
    abstract = abstract_state(blueprint, optimizer, mesh, split, average)
    shardings = jax.tree.map(lambda a: a.sharding, abstract)
    init_key, run_key = jax.random.split(jax.random.key(seed))
    # Waited for: two programs in flight can starve each other on simulated devices.
    params = jax.block_until_ready(blueprint.init(init_key) if variables is None else variables.params)
    router = blueprint.init_router() if variables is None else variables.router

    def rest(params: Params) -> dict[str, Any]:
        return {
            "step": jnp.zeros((), jnp.int32),
            "opt_state": optimizer.init(params),
            "rng": jax.random.key_data(run_key),
            "balance_weight": jnp.full(abstract.balance_weight.shape, blueprint.config.moe.losses.get("balance", 0.0)),
            "skipped": jnp.zeros((), jnp.int32),
            "rollbacks": jnp.zeros((), jnp.int32),
            "ema": jax.tree.map(jnp.copy, params) if average else {},
        }

    places = {name: getattr(shardings, name) for name in jax.eval_shape(rest, params)}
    others = jax.jit(rest, out_shardings=places)(params)
    return jax.block_until_ready(TrainState(params=params, router=router, **others))


def abstract_state(
    blueprint: Blueprint,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    split: Params | None = None,
    average: bool = False,
) -> TrainState:
    """Shapes, dtypes and shardings of a state: counters live everywhere, parameters where the blueprint says, moments
    and the average, if there is one, where ``split`` has their parameter (default: with the parameter)."""
    config, everywhere = blueprint.config, NamedSharding(mesh, PartitionSpec())
    split = blueprint.params if split is None else split
    return TrainState(
        step=_placed(np.zeros((), np.int32), everywhere),
        params=blueprint.params,
        opt_state=abstract_optimizer_state(optimizer, split, everywhere),
        rng=_placed(np.zeros(2, np.uint32), everywhere),
        router=blueprint.router,
        balance_weight=_placed(np.zeros(config.moe_layers, np.float32), everywhere),
        skipped=_placed(np.zeros((), np.int32), everywhere),
        rollbacks=_placed(np.zeros((), np.int32), everywhere),
        ema=split if average else {},
    )


def abstract_optimizer_state(optimizer: optax.GradientTransformation, params: Params, everywhere: NamedSharding) -> Any:
    """What ``optimizer`` keeps of abstract ``params``, each value where its parameter's is.

    Dimensions that it has reduced to size 1 (a factored moment's) are whole; what belongs to no parameter is
    ``everywhere``.
    """

    def with_parameter(array: Any, param: Any) -> Any:
        if isinstance(array, optax.MaskedNode):  # another optimizer's parameter
            return array
        sizes = zip(entries_of(param.sharding.spec, len(param.shape)), array.shape, param.shape, strict=True)
        spec = PartitionSpec(*(entry if size == whole else None for entry, size, whole in sizes))
        return _placed(array, NamedSharding(param.sharding.mesh, spec))

    return optax.tree_utils.tree_map_params(
        optimizer,
        with_parameter,
        jax.eval_shape(optimizer.init, params),
        params,
        transform_non_params=lambda array: _placed(array, everywhere),
        is_leaf=lambda leaf: isinstance(leaf, optax.MaskedNode),
    )


def _placed(array: Any, sharding: NamedSharding) -> Any:
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)
