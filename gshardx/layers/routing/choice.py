"""The parts that token-choice routers are made of: capacity, the k best experts, and slots."""

import dataclasses
import math
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from gshardx.errors import BadInput

Priority = Literal["position", "gate", "random"]
"""Who takes slots first among equal ranks: earlier tokens (GShard), those with the larger first gate (V-MoE's
batch-prioritised routing, arXiv 2106.05974), or in training whoever is drawn (DeepSpeed's random token selection)."""


@dataclasses.dataclass(frozen=True)
class Capacity:
    """How many slots an expert has for a group: ``factor * k * s / e``, rounded, at most s.

    GShard's C = 2 S / E (arXiv 2006.16668 section 2.2) is factor 1 at k = 2.
    """

    factor: float | None = 1.25
    """In training, as a multiple of an even share of the choices; None: room for every choice (dropless)."""
    evaluation: float | None = None
    """The same without an rng. None: dropless, so that no token's output depends on another token."""
    rounding: Literal["up", "down", "four"] = "up"
    """"four": down, then up to a multiple of 4, as in lingvo's code (there so that XLA need not pad)."""
    minimum: int = 1
    """Smallest number of slots (lingvo and flaxformer: 4)."""
    tile: int = 1
    """Slots are rounded up to a multiple of it."""

    def slots(self, tokens: int, num_experts: int, top_k: int, training: bool) -> int:
        """Slots of an expert for a group of ``tokens``. A token chooses an expert once, so more than s stay empty."""
        factor = self.factor if training else self.evaluation
        if factor is None:
            return tokens
        share = factor * top_k * tokens / num_experts
        noise = 1e-9 * share  # of the factor: 1.1 * 100 / 10 is a little above 11
        rounded = math.ceil(share - noise) if self.rounding == "up" else int(share + noise)
        if self.rounding == "four":
            rounded = math.ceil(rounded / 4) * 4
        return min(tokens, math.ceil(max(rounded, self.minimum) / self.tile) * self.tile)


def top_k(scores: Float[Array, "g s e"], k: int) -> Int[Array, "g s k"]:
    """The k best experts of each token, best first, lower index first among equals. No gradient.

    k rounds of a maximum and a search for it: ``jax.lax.top_k`` is not partitioned on CPU and gathers every gate to
    every device, and ``jnp.argmax`` reduces pairs, which CPUs do not vectorise (benchmarks/moe_layer.py, --part
    choice). NaN counts as the least of numbers, so that no token chooses an expert twice: slots rely on that.
    """
    scores = jax.lax.stop_gradient(scores)
    scores = jnp.where(jnp.isnan(scores), jnp.finfo(scores.dtype).min, scores)
    number = jnp.arange(scores.shape[-1], dtype=jnp.int32)
    ids = []
    for _ in range(k):
        highest = scores.max(-1, keepdims=True)
        best = jnp.min(jnp.where(scores == highest, number, scores.shape[-1] - 1), axis=-1)
        ids.append(best)
        scores = jnp.where(number == best[..., None], -jnp.inf, scores)
    return jnp.stack(ids, axis=-1)


def take(values: Float[Array, "g s e"], experts: Int[Array, "g s k"]) -> Float[Array, "g s k"]:
    """``values`` at the chosen experts, by comparison: gathers and scatters of single floats are slow."""
    number = jnp.arange(values.shape[-1], dtype=experts.dtype)
    picked = [jnp.where(number == experts[..., i, None], values, 0.0).sum(-1) for i in range(experts.shape[-1])]
    return jnp.stack(picked, axis=-1)


def check_groups(num_experts: int, top_k: int, groups: int, kept: int) -> None:
    """Raise BadInput unless ``groups`` divide the experts and those ``kept`` hold enough of them for ``top_k``."""
    if groups < 1 or num_experts % groups:
        raise BadInput(f"groups = {groups} does not divide num_experts = {num_experts}; use a divisor of it")
    needed = math.ceil(top_k * groups / num_experts)
    if not needed <= kept <= groups:
        raise BadInput(
            f"groups_kept = {kept}: of {groups} groups of {num_experts // groups} experts, top_k = {top_k} needs at "
            f"least {needed}, and there are no more than {groups}; use {needed}"
        )


def best_groups(scores: Float[Array, "g s e"], groups: int, kept: int, best_of: int) -> Bool[Array, "g s e"]:
    """Experts in the ``kept`` best of ``groups`` equal groups (of devices or nodes: DeepSeek-V2, arXiv 2405.04434).

    A group's score is the sum of its ``best_of`` best experts: 1 in DeepSeek-V2, 2 in V3.
    """
    by_group = scores.reshape(*scores.shape[:2], groups, -1)
    g, s, _, size = by_group.shape
    flat = by_group.reshape(g, s * groups, size)
    score = take(flat, top_k(flat, min(best_of, size))).sum(-1).reshape(g, s, groups)
    chosen = (top_k(score, kept)[..., None] == jnp.arange(groups)).any(-2)
    return jnp.repeat(chosen, size, axis=-1)


def sort_by_expert(experts: Int[Array, "n"], num_experts: int) -> tuple[Int[Array, "n"], Int[Array, "e"]]:
    """A stable order of choices by expert, and each expert's count; ids of ``num_experts`` and above go last.

    Sorts one integer that holds expert and index: several times faster on CPU than a stable sort of pairs, and its cost
    does not depend on the number of experts, as that of GShard's cumulative sum of one-hots does.
    """
    n = experts.shape[0]
    ids = jnp.minimum(experts, num_experts)
    if (num_experts + 1) * n < 2**31:
        order = jnp.sort(ids * n + jnp.arange(n, dtype=jnp.int32)) % n
    else:
        order = jnp.argsort(ids, stable=True).astype(jnp.int32)
    bounds = jnp.searchsorted(ids[order], jnp.arange(num_experts + 1, dtype=jnp.int32)).astype(jnp.int32)
    return order, jnp.diff(bounds)


def assign_slots(
    experts: Int[Array, "g s k"],
    wanted: Bool[Array, "g s k"],
    num_experts: int,
    priority: Float[Array, "g s"] | None = None,
) -> tuple[Int[Array, "g s k"], Int[Array, "g e"]]:
    """Number the wanted choices of each expert from 0 within each group, and count them.

    Choice-major: every first choice of the group comes before any second choice (GShard, Algorithm 1). Among equal
    ranks earlier tokens come first, or those of higher ``priority``. A choice that is not wanted takes no number.
    """

    if priority is None:
        return jax.vmap(partial(_number, num_experts=num_experts))(experts, wanted)
    order = jnp.argsort(-jax.lax.stop_gradient(priority), axis=-1, stable=True)
    back = jnp.argsort(order, axis=-1)[..., None]
    in_order = (jnp.take_along_axis(x, order[..., None], axis=1) for x in (experts, wanted))
    slots, counts = jax.vmap(partial(_number, num_experts=num_experts))(*in_order)
    return jnp.take_along_axis(slots, back, axis=1), counts


def _number(
    experts: Int[Array, "s k"], wanted: Bool[Array, "s k"], num_experts: int
) -> tuple[Int[Array, "s k"], Int[Array, "e"]]:
    s, k = experts.shape
    ids = jnp.where(wanted, experts, num_experts).T.reshape(k * s)
    order, counts = sort_by_expert(ids, num_experts)
    starts = jnp.cumsum(counts) - counts
    place = jnp.arange(k * s, dtype=jnp.int32) - starts.at[ids[order]].get(mode="fill", fill_value=0)
    slots = jnp.zeros(k * s, jnp.int32).at[order].set(place, unique_indices=True)
    return slots.reshape(k, s).T, counts
