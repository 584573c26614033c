"""From a dense model to one with experts that computes the same: sparse upcycling (arXiv 2212.05055).

A dense feed-forward network of h hidden units is a sum over them, ``y = sum_j a_j(x) w_down[j]``, so any partition of
them into networks keeps the function, as long as each part is computed once:

    shared      s units, computed for every token (DeepSeekMoE, arXiv 2401.06066), the others are routed
    split G     the (h - s) routed units in G equal shards; expert e is a copy of shard e % G (arXiv 2410.07524)

With G = 1 all experts are equal, and whatever a token chooses, its gates add up to 1 (renormalised top-k). With G > 1
the router's columns of experts c G ... c G + G - 1, the G shards of copy c, start equal (virtual groups, the same
paper): they tie, so that a token that chooses k experts, k a multiple of G, chooses k / G whole copies. Copy c has gate
p_c / (G sum_chosen p) on each of its shards, and

    y = sum_chosen p_c / (G sum p) sum_g shard_g(x) scale = scale / G * y_dense,    so scale = G, on w_down

which is exact in any float where G is a power of 2. Gradients differ from the first step on and part the ties.
"""

import dataclasses
import zlib
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float

from gshardx.config import ModelConfig
from gshardx.convert.rewrite import EXPERTS, ROUTER, Given, Part
from gshardx.convert.rules import spot_of
from gshardx.errors import BadInput

BESIDE = "feed_forward.beside."
ROUTER_DEVIATION = 0.02  # as new routers here have it
_BALANCE = {"balance": 0.01}  # the config's default; a dense model has no such loss


class Upcycling(NamedTuple):
    """What to make of a dense model.

    Attributes:
        experts: of each MoE layer.
        top_k: that a token chooses.
        split: G, shards of a network.
        shared: hidden units of a shared expert; 0: none.
        gated: multiply the shared expert by a sigmoid, which starts at 1/2 (Qwen2-MoE).
        noise: on experts' weights, as a multiple of each matrix's own deviation.
        every: every how many layers one gets experts; None: those that have one expert now.
        seed: of the router and the noise.
    """

    experts: int
    top_k: int
    split: int = 1
    shared: int = 0
    gated: bool = False
    noise: float = 0.0
    every: int | None = None
    seed: int = 0


def upcycled(model: ModelConfig, how: Upcycling) -> ModelConfig:
    """The config of the new model.

    Raises:
        BadInput: the model isn't dense, or can't be divided so.
    """
    moe = model.moe
    check_dense(model)
    every = how.every or moe.every
    if how.shared and moe.shared_hidden:
        raise BadInput(f"--shared {how.shared}: the model has model.moe.shared_hidden = {moe.shared_hidden} already")
    if how.experts % how.split or how.top_k % how.split:
        experts, top_k = (-(-count // how.split) * how.split for count in (how.experts, how.top_k))
        raise BadInput(
            f"--split {how.split}: a token chooses whole copies, so --experts {how.experts} and --top_k {how.top_k} "
            f"must be multiples of it; use --experts {experts} --top_k {top_k}"
        )
    if how.shared >= moe.hidden or (moe.hidden - how.shared) % how.split:
        raise BadInput(
            f"--split {how.split} --shared {how.shared}: model.moe.hidden = {moe.hidden} less the shared units must be "
            f"a multiple of the split, and above 0"
        )
    changes_kind = every != moe.every
    if changes_kind and (moe.biases or moe.shared_hidden):
        what = "model.moe.biases" if moe.biases else "model.moe.shared_hidden"
        raise BadInput(f"--every {every}: dense layers have no {what}, and this model has; leave --every out")
    has_dense = moe.every > 1 or moe.dense_first > 0
    if changes_kind and has_dense and model.hidden != moe.hidden:
        raise BadInput(
            f"--every {every}: dense layers have model.hidden = {model.hidden} and the others model.moe.hidden = "
            f"{moe.hidden} units; leave --every out"
        )
    kind: Literal["gated", "plain"] = "gated" if how.gated else "plain"
    new = dataclasses.replace(
        moe,
        num_experts=how.experts,
        top_k=how.top_k,
        every=every,
        router="top_k",
        router_options={"renormalise": True},
        hidden=(moe.hidden - how.shared) // how.split,
        losses=moe.losses or _BALANCE,
        shared_hidden=how.shared or moe.shared_hidden,
        shared=kind if how.shared else moe.shared,
    )
    return dataclasses.replace(model, moe=new, hidden=moe.hidden if changes_kind else model.hidden)


def check_dense(model: ModelConfig) -> None:
    """Raise BadInput unless every token goes to one expert, with a gate of 1."""
    moe = model.moe
    if moe.num_experts != 1:
        raise BadInput(f"model.moe.num_experts = {moe.num_experts}: not dense; this starts from one expert")
    options = moe.router_options
    one = moe.router in ("top_k", "switch") or (moe.router == "sigmoid_bias" and options.get("renormalise", True))
    if not one or options.get("scale", 1.0) != 1.0 or options.get("weigh", "output") != "output":
        raise BadInput(f"model.moe.router = {moe.router} {options}: the one expert's gate is not 1; that is not dense")


def routed_units(hidden: int, how: Upcycling, expert: int) -> slice:
    """The hidden units of a dense network that an expert has."""
    size = (hidden - how.shared) // how.split
    first = how.shared + expert % how.split * size
    return slice(first, first + size)


def of_units(name: str, weights: Float[np.ndarray, "..."], units: slice, scale: float) -> np.ndarray:
    """What some hidden units have of a network's array ``name``: ``w_up`` and ``w_gate`` [m, h], ``w_down`` [h, m],
    ``b_up`` and ``b_gate`` [h], ``b_down`` [m], whole as the gates that weigh it add up to 1. ``scale``: of their
    output."""
    if name == "b_down":
        return weights
    if name == "w_down":
        return (weights[units].astype(np.float32) * scale).astype(weights.dtype)
    return weights[..., units]


def router_kernel(width: int, how: Upcycling, layer: int) -> Float[np.ndarray, "m e"]:
    """Small and random; equal within each copy's shards."""
    draw = np.random.default_rng([how.seed, layer])
    columns = draw.normal(0.0, ROUTER_DEVIATION, (width, how.experts // how.split))
    return np.repeat(columns, how.split, axis=1).astype(np.float32)


def noisy(weights: np.ndarray, how: Upcycling, part: Part) -> np.ndarray:
    """``weights`` with noise of their own deviation times ``how.noise``."""
    if not how.noise:
        return weights
    draw = np.random.default_rng([how.seed, part.layer or 0, part.expert or 0, zlib.crc32(part.rest.encode())])
    wide = weights.astype(np.float32)
    return (wide + how.noise * wide.std() * draw.standard_normal(wide.shape, np.float32)).astype(weights.dtype)


def upcycled_part(given: Given, model: ModelConfig, how: Upcycling, part: Part) -> np.ndarray:
    """What the new model has, from the dense one."""
    if part.layer is None:
        return given.outside(part)
    old, last = given.config.model, part.rest.rpartition(".")[2]
    if part.rest == f"{ROUTER}kernel":
        return router_kernel(model.width, how, part.layer)
    if part.rest.startswith(EXPERTS):
        units = routed_units(old.moe.hidden, how, part.expert or 0)
        return noisy(of_units(last, dense(given, part.layer, last), units, how.split), how, part)
    if how.shared and part.rest == f"{BESIDE}gate":
        return np.zeros(model.width, np.float32)
    if how.shared and part.rest.startswith(BESIDE):
        return of_units(last, dense(given, part.layer, last), slice(how.shared), 2.0 if how.gated else 1.0)
    if part.rest == f"feed_forward.{last}":
        return dense(given, part.layer, last)
    return given.in_layer(part.layer, part.rest)


def dense(given: Given, layer: int, name: str) -> np.ndarray:
    """An array of a layer's feed-forward network, which may be a single expert."""
    if spot_of(given.config.model, layer).sparse:
        return given.in_layer(layer, EXPERTS + name, 0)
    return given.in_layer(layer, f"feed_forward.{name}")
