"""Fewer, more, merged or reordered experts: what each new expert is made of, and whose column of the router it has.

permute     expert i becomes number order[i] before; the same function
duplicate   N copies of each, side by side, and N k choices: copies tie, so a token chooses all copies of its k experts,
            and theirs together weigh what the one did. Softmax over all: p / N each, and over the chosen ones
            p / (N sum p). A shift of the copies' logits by -log N is the same for all and changes nothing; of experts
            with different numbers of copies it would keep the sum, not the choice, so all get as many.
prune       those with the most choices stay (SEER-MoE, arXiv 2404.05089); others' tokens go to their next best
merge       those with the most choices stay, the others join the one whose router logits are most like theirs,
            weighted by choices, hidden units matched first (M-SMoE, arXiv 2310.01334)
"""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int
from scipy.optimize import linear_sum_assignment

from gshardx.config import ModelConfig
from gshardx.convert.rewrite import EXPERTS, ROUTER, Given, Part
from gshardx.convert.rules import spot_of
from gshardx.errors import BadInput

_OTHERWISE = ("cosine", "adamoe", "dynmoe", "hash", "demix", "soft_moe", "stable", "moe_pp", "smear")
"""Routers that do not have a column and a bias for each expert, and nothing else."""
_NOT_COPIED = ("switch", "sparse_mixer", "base", "sinkhorn", "relu", "smoe_dropout", "dselect_k")
"""Routers whose weights of two copies of an expert do not add up to the expert's."""


class Change(NamedTuple):
    """Of one layer. mix: weights of old experts in new ones; columns: the old expert whose router column each new one
    has, and to whose hidden units others are matched."""

    mix: Float[np.ndarray, "new old"]
    columns: Int[np.ndarray, "new"]


def taken(experts: Sequence[int], count: int) -> Change:
    """New experts that each are an old one, of ``count``."""
    columns = np.asarray(experts, np.int64)
    return Change(np.eye(count)[columns], columns)


def _check_router(model: ModelConfig) -> None:
    """Raise BadInput unless the router's parameters can follow the experts."""
    if model.moe.router in _OTHERWISE:
        raise BadInput(
            f"model.moe.router = {model.moe.router}: does not have a column for each expert alone, so its experts "
            "can't be changed; use a run whose router is top_k"
        )


def permuted(order: Sequence[int], model: ModelConfig) -> Change:
    """New expert i is old expert ``order[i]``.

    Raises:
        BadInput: not each number once, the router's groups would be mixed, or the router can't follow.
    """
    _check_router(model)
    count, groups = model.moe.num_experts, int(model.moe.router_options.get("groups", 1))
    if sorted(order) != list(range(count)):
        raise BadInput(f"--order {','.join(map(str, order))}: must have each of 0 ... {count - 1} once")
    size = count // groups
    if any(len({number // size for number in order[i * size : (i + 1) * size]}) > 1 for i in range(groups)):
        raise BadInput(f"--order: model.moe.router_options.groups = {groups} must stay together, {size} experts each")
    return taken(order, count)


def duplicated(model: ModelConfig, copies: int) -> tuple[ModelConfig, Change]:
    """``copies`` of each expert, and as many times the choices.

    Raises:
        BadInput: the router would weigh the copies otherwise, or can't follow.
    """
    _check_router(model)
    moe, options = model.moe, dict(model.moe.router_options)
    sigmoid = moe.router == "sigmoid_bias" or (moe.router == "quantile" and options.get("score") != "softmax")
    if moe.router in _NOT_COPIED or options.get("weigh") == "input":
        raise BadInput(f"model.moe.router = {moe.router}: copies of an expert would not add up to it; use top_k")
    if sigmoid and options.get("groups", 1) > 1:
        raise BadInput("model.moe.router_options.groups: their two best experts would be copies; not for sigmoid_bias")
    if (sigmoid and not options.get("renormalise", True)) or options.get("softmax") == "none":
        options["scale"] = options.get("scale", 1.0) / copies
    count, top_k = moe.num_experts, moe.top_k if moe.router == "lory" else copies * moe.top_k
    new = dataclasses.replace(moe, num_experts=copies * count, top_k=top_k, router_options=options)
    return dataclasses.replace(model, moe=new), taken(np.repeat(np.arange(count), copies).tolist(), count)


def fewer(model: ModelConfig, keep: int) -> ModelConfig:
    """The config with ``keep`` experts.

    Raises:
        BadInput: as many or fewer there already, fewer than a token chooses, or a router with groups or that can't
            follow.
    """
    _check_router(model)
    moe = model.moe
    if not moe.top_k <= keep < moe.num_experts:
        raise BadInput(
            f"--keep {keep}: must be below model.moe.num_experts = {moe.num_experts}, and at least "
            f"model.moe.top_k = {moe.top_k}"
        )
    if moe.router_options.get("groups", 1) > 1:
        raise BadInput("model.moe.router_options.groups: their experts can't become fewer")
    return dataclasses.replace(model, moe=dataclasses.replace(moe, num_experts=keep))


def most_chosen(counts: Float[np.ndarray, "e"], keep: int) -> list[int]:
    """Numbers of the experts with the largest counts, ascending; of equal ones the first."""
    return sorted(np.argsort(-counts, kind="stable")[:keep].tolist())


def merged(counts: Float[np.ndarray, "e"], likeness: Float[np.ndarray, "e e"], keep: int) -> Change:
    """Groups around the most chosen experts, each expert in that of the most alike one.

    Args:
        counts: of choices.
        likeness: of two experts.
        keep: how many stay.
    """
    stay = most_chosen(counts, keep)
    group = np.argmax(likeness[:, stay], axis=1)
    group[stay] = np.arange(keep)
    weights = np.maximum(counts, 1e-9)  # a group that nobody chose is averaged
    mix = np.where(group == np.arange(keep)[:, None], weights, 0.0)
    return Change(mix / mix.sum(1, keepdims=True), np.asarray(stay))


def likeness_of(kernel: Float[np.ndarray, "m e"]) -> Float[np.ndarray, "e e"]:
    """Cosines of the experts' router columns: of their logits, over inputs without a preferred direction."""
    columns = kernel.astype(np.float64)
    columns = columns / np.maximum(np.linalg.norm(columns, axis=0), 1e-30)
    found: np.ndarray = columns.T @ columns
    return found


def matched(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> Int[np.ndarray, "h"]:
    """For each hidden unit of an expert, the unit of another that is to be added to it: the sum of their weights'
    products is the largest that any assignment has."""
    scores: Any = 0.0
    for name in one:
        if name == "b_down":
            continue
        mine, theirs = (both[name].astype(np.float32) for both in (one, other))
        mine, theirs = (array if name == "w_down" else np.atleast_2d(array).T for array in (mine, theirs))
        scores = scores + mine @ theirs.T
    found: np.ndarray = linear_sum_assignment(scores, maximize=True)[1]
    return found


def of_matched(name: str, array: np.ndarray, units: Int[np.ndarray, "h"]) -> np.ndarray:
    """An expert's array with its hidden units in another order."""
    if name == "b_down":
        return array
    return array[units] if name == "w_down" else array[..., units]


@dataclasses.dataclass
class Changed:
    """What a run with changed experts has: ``changes`` by layer."""

    given: Given
    changes: dict[int, Change]

    def __post_init__(self) -> None:
        self._matched: dict[tuple[int, int, int], np.ndarray] = {}
        self._names = {name.rpartition(".")[2] for name in self.given.dtypes if f".{EXPERTS}" in name}

    def value(self, part: Part) -> np.ndarray:
        """Of a part of the new run."""
        if part.layer is None:
            return self.given.outside(part)
        if part.expert is not None:
            return self._expert(part.layer, part.rest, part.expert)
        old = self.given.in_layer(part.layer, part.rest)
        return old[..., self.changes[part.layer].columns] if part.rest.startswith(ROUTER) else old

    def state(self) -> dict[str, np.ndarray] | None:
        """The routers' state."""
        arrays = [name.partition("/")[2] for name in self.given.saved.manifest.arrays if name.startswith("router/")]
        columns = np.stack([self.changes[layer].columns for layer in sorted(self.changes)])
        leaves = {name: self.given.state(name) for name in arrays}
        return {name: np.take_along_axis(x, columns, axis=1) if x.ndim > 1 else x for name, x in leaves.items()} or None

    def _expert(self, layer: int, rest: str, expert: int) -> np.ndarray:
        mix, columns = self.changes[layer]
        olds, name = np.flatnonzero(mix[expert]), rest.rpartition(".")[2]
        if len(olds) == 1:
            return self.given.in_layer(layer, rest, int(olds[0]))
        total: Any = 0.0
        for old in map(int, olds):
            array = self.given.in_layer(layer, rest, old).astype(np.float32)
            if old != columns[expert]:
                array = of_matched(name, array, self._units(layer, int(columns[expert]), old))
            total = total + np.float32(mix[expert, old]) * array
        return np.asarray(total)

    def _units(self, layer: int, one: int, other: int) -> np.ndarray:
        key = (layer, one, other)
        if key not in self._matched:
            both = ({name: self.given.in_layer(layer, EXPERTS + name, number) for name in self._names}
                    for number in (one, other))  # fmt: skip
            self._matched[key] = matched(*both)
        return self._matched[key]


def sparse_layers(model: ModelConfig) -> list[int]:
    """Numbers of the layers with experts."""
    return [layer for layer in range(model.layers) if spot_of(model, layer).sparse]


def saved_counts(given: Given) -> Float[np.ndarray, "moe_layer e"]:
    """Shares of choices that training wrote to expert_load.jsonl, the last ones up to the step.

    Raises:
        BadInput: there are none.
    """
    path: Path = given.saved.run / "expert_load.jsonl"
    try:
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        loads = [np.asarray(line["load"], np.float64) for line in lines if line["step"] <= given.saved.step]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadInput(f"{path}: can't be read; give --data PATH, text to count choices on") from error
    moe = given.config.model
    if not loads or loads[-1].shape != (moe.moe_layers, moe.moe.num_experts):
        raise BadInput(f"{path}: no line on this model up to step {given.saved.step}; give --data PATH instead")
    return loads[-1]
