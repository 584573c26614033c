"""From a config to an MoE layer: router, dispatcher, experts, and what stands beside them."""

import functools
import inspect
from typing import Any

import jax
from flax import nnx

from gshardx.config import ModelConfig, MoEConfig
from gshardx.errors import BadInput
from gshardx.layers import (
    Auto,
    Capacity,
    Einsum,
    Experts,
    FeedForward,
    GatedShared,
    Gather,
    Kinds,
    MoE,
    Ragged,
    Residual,
    Shared,
    kinds_of,
)
from gshardx.layers.balance import BalanceLoss, Loss
from gshardx.layers.dispatch import Dispatcher, choose_dispatcher
from gshardx.layers.losses import CommunicationLoss, DeviceLoss, ImportanceLoss
from gshardx.layers.routing import ROUTERS, RouterBase
from gshardx.layers.routing.choice import check_groups
from gshardx.layers.routing.ds_moe import MutualInformationLoss
from gshardx.layers.routing.merging import MergingRouter
from gshardx.layers.shared import Beside, nothing
from gshardx.models.options import Options, check_options

_FROM_CONFIG = {"self", "width", "num_experts", "top_k", "capacity", "losses", "vocab", "rngs", "common"}


NEEDED = {"relu": ("sparsity", 1.0, "makes it sparse"), "stable": ("distillation", 0.3, "teaches its second stage")}
"""The loss without which a router is not what it is, its weight, and what it does."""


def build_moe(config: ModelConfig, output_scale: float, rngs: nnx.Rngs, vocab: int | None = None) -> MoE:
    """The sparse layer of ``config``; ``vocab`` for routers that learn something of each id."""
    moe = config.moe
    router = build_router(moe, config.width, rngs, vocab)
    return MoE(
        router,
        build_dispatcher(moe),
        Experts(
            moe.num_experts,
            config.width,
            moe.hidden,
            config.activation,
            biases=moe.biases,
            output_scale=output_scale,
            rngs=rngs,
        ),
        _beside(config, output_scale, rngs),
        group_size=moe.group_size,
        kinds=kinds_of(router, config.width, rngs=rngs),
    )


def build_dispatcher(moe: MoEConfig) -> Dispatcher:
    wire = "bfloat16" if moe.wire == "bfloat16" else None
    makers: dict[str, Dispatcher] = {
        "auto": Auto(moe.hidden, wire),
        "gather": Gather(wire),
        "einsum": Einsum(wire),
        "ragged": Ragged(wire=wire),
    }
    return makers[moe.dispatcher]


def dispatcher_reason(moe: MoEConfig, sequence_length: int) -> str:
    """What the dispatcher is in training, and why, in a line."""
    if moe.dispatcher != "auto":
        return f"{moe.dispatcher}: model.moe.dispatcher says so"
    if ROUTERS[moe.router].MIXES:
        return f"mixing: router {moe.router} puts every token in every slot"
    if issubclass(ROUTERS[moe.router], MergingRouter):
        return f"blending: router {moe.router} merges experts"
    group = moe.group_size or sequence_length
    return choose_dispatcher(
        group=group,
        hidden=moe.hidden,
        num_experts=moe.num_experts,
        top_k=training_choices(moe),
        dropless=training_slots(moe, group) == group,
    ).reason


def build_router(moe: MoEConfig, width: int, rngs: nnx.Rngs, vocab: int | None = None) -> RouterBase:
    """Raises BadInput for options that the router does not have."""
    made: Any = ROUTERS[moe.router]
    options = check_router_options(moe)
    losses = dict(made.LOSSES) | {name: _loss(name, moe) for name in moe.losses if name not in made.LOSSES}
    common: dict[str, Any] = {"capacity": Capacity(moe.capacity_factor), "losses": losses, "rngs": rngs}
    own = {"top_k": moe.top_k, "vocab": vocab}
    common |= {name: own[name] for name in own.keys() & inspect.signature(made.__init__).parameters.keys()}
    try:
        router: RouterBase = made(width=width, num_experts=moe.num_experts, **common, **options)
    except BadInput as error:
        raise BadInput(f"model.moe.router = {moe.router}: {error}") from error
    return router


def training_stretch(moe: MoEConfig, group: int) -> int | None:
    """Tokens of a group that share a network merged from experts; None: the router merges none."""
    return _abstract_router(moe, 1)[0].stretch(group)


def training_choices(moe: MoEConfig) -> int:
    """Experts that a token may choose in training: what slots and sorted rows have room for."""
    return _abstract_router(moe, 1)[0].choices(training=True)


def training_slots(moe: MoEConfig, group: int) -> int:
    """Slots of an expert in training, for a group of so many tokens."""
    router, _ = _abstract_router(moe, 1)
    return router.capacity.slots(group, moe.num_experts, router.choices(training=True), training=True)


def router_matrices(config: ModelConfig) -> list[tuple[int, int]]:
    """The sides of each matrix of a router, and of experts that are computed where tokens are; each is multiplied with
    every token, or with weights of its, once."""
    return [shape for axes, shape in _matrices(config) if axes[0] != "token"]


def router_words(config: ModelConfig) -> int:
    """Columns of a router's own embedding of the vocabulary, which is looked up in and not multiplied with."""
    return sum(shape[1] for axes, shape in _matrices(config) if axes[0] == "token")


def _matrices(config: ModelConfig) -> list[tuple[tuple[str, ...], tuple[int, int]]]:
    """Names and sizes of a router's parameters of two dimensions, and of its other experts'."""
    parameters = nnx.state(_abstract_router(config.moe, config.width), nnx.Param)
    found: list[Any] = jax.tree.leaves(parameters, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))
    return [(p.get_metadata()["axes"], p.shape) for p in found if len(p.shape) == 2]


def _abstract_router(moe: MoEConfig, width: int) -> tuple[RouterBase, Kinds | None]:
    options = tuple((name, tuple(x) if isinstance(x, list) else x) for name, x in moe.router_options.items())
    factor, losses = moe.capacity_factor, tuple(moe.losses.items())
    return _traced_router(moe.router, moe.num_experts, moe.top_k, factor, options, losses, width)


@functools.cache
def _traced_router(
    name: Any,
    num_experts: int,
    top_k: int,
    factor: float | None,
    options: tuple[Any, ...],
    losses: tuple[Any, ...],
    width: int,
) -> tuple[RouterBase, Kinds | None]:
    """Traced once: a search for a plan asks thousands of times, and it takes 7 ms."""
    given = {option: list(x) if isinstance(x, tuple) else x for option, x in options}
    moe = MoEConfig(num_experts, top_k, router=name, router_options=given, losses=dict(losses), capacity_factor=factor)

    def build() -> tuple[RouterBase, Kinds | None]:
        router = build_router(moe, width, nnx.Rngs(0), vocab=1)
        return router, kinds_of(router, width, rngs=nnx.Rngs(0))

    return nnx.eval_shape(build)


def router_options(name: str) -> Options:
    """What ``model.moe.router_options`` may hold for the router ``name``."""
    options: dict[str, inspect.Parameter] = {}
    for kind in reversed(ROUTERS[name].__mro__):
        if issubclass(kind, RouterBase):
            options |= inspect.signature(kind.__init__).parameters
    return {option: parameter for option, parameter in options.items() if option not in _FROM_CONFIG}


def check_router_options(moe: MoEConfig) -> dict[str, Any]:
    """``moe.router_options``, each known to ``moe.router`` and of its type.

    Raises:
        BadInput: otherwise, with the nearest name or the values that would do.
    """
    known = router_options(moe.router)
    if moe.router in ("switch", "base", "demix", "stable") and moe.top_k != 1:
        raise BadInput(
            f"model.moe.router = {moe.router} chooses one expert, but model.moe.top_k = {moe.top_k}; use top_k 1"
        )
    if issubclass(ROUTERS[moe.router], MergingRouter):
        _check_merging(moe)
    options = check_options("model.moe.router_options", moe.router_options, known, f"router {moe.router!r}")
    groups, kept = (int(moe.router_options.get(name, 1)) for name in ("groups", "groups_kept"))
    try:
        check_groups(moe.num_experts, moe.top_k, groups, kept)
    except BadInput as error:
        raise BadInput(f"model.moe.router_options.{error}") from error
    for name in moe.losses:
        owners = [router for router, made in ROUTERS.items() if name in made.LOSSES]
        if owners and moe.router not in owners:
            raise BadInput(f"model.moe.losses.{name} is no loss of this router; use model.moe.router {owners[0]}")
    if moe.router in NEEDED:
        name, weight, does = NEEDED[moe.router]
        if name not in moe.losses:
            raise BadInput(
                f"model.moe.router = {moe.router}: nothing but its loss {does}; set model.moe.losses.{name} to {weight}"
            )
    if ROUTERS[moe.router].MIXES and moe.dispatcher in ("gather", "ragged"):
        raise BadInput(
            f"model.moe.dispatcher = {moe.dispatcher} puts one token in a slot, where router {moe.router} mixes all; "
            "use auto"
        )
    for name in {"device", "communication"} & set(moe.losses):
        if "groups" not in known:
            raise BadInput(
                f"model.moe.losses.{name} needs groups of experts; use model.moe.router top_k or sigmoid_bias"
            )
        if groups == 1:
            raise BadInput(f"model.moe.losses.{name} needs groups of experts; set model.moe.router_options.groups")
    return options


def _check_merging(moe: MoEConfig) -> None:
    if moe.router in ("smear", "lory") and moe.top_k != 1:
        raise BadInput(
            f"model.moe.router = {moe.router} merges all experts into one network, but model.moe.top_k = {moe.top_k}; "
            "use top_k 1"
        )
    for name, value, usual in (("dispatcher", moe.dispatcher, "auto"), ("wire", moe.wire, "same")):
        if value != usual:
            raise BadInput(
                f"model.moe.{name} = {value}: router {moe.router} merges experts and sends no token; use {usual}"
            )


def _loss(name: str, moe: MoEConfig) -> Loss:
    groups, kept = (int(moe.router_options.get(option, 1)) for option in ("groups", "groups_kept"))
    losses: dict[str, Loss] = {
        "first_choice": BalanceLoss(choices="first"),
        "all_choices": BalanceLoss(),
        "batch": BalanceLoss(over="batch"),
        "device": DeviceLoss(groups),
        "communication": CommunicationLoss(groups, kept),
        "importance": ImportanceLoss(),
        "mutual_information": MutualInformationLoss(),
    }
    return losses[name]


def _beside(config: ModelConfig, output_scale: float, rngs: nnx.Rngs) -> Beside:
    moe = config.moe
    if not moe.shared_hidden:
        return nothing
    dense = FeedForward(config.width, moe.shared_hidden, config.activation, output_scale=output_scale, rngs=rngs)
    if moe.shared == "plain":
        return Shared(dense)
    return (GatedShared if moe.shared == "gated" else Residual)(config.width, dense, rngs=rngs)
