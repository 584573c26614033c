"""Losses that keep the experts' loads even.

One convention: a balance loss is 1.0 a layer at perfect balance, whatever the number of experts, choices, groups or
devices (layers/conventions.py converts others). Shares count choices before any is dropped, gradients flow through the
mean gates alone, and padding counts nowhere.
"""

import abc
import dataclasses
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


class Gating(NamedTuple):
    """What losses see of a router's decision."""

    logits: Float[Array, "g s e"]
    gates: Float[Array, "g s e"]  # fp32; a distribution over experts
    experts: Int[Array, "g s k"]
    valid: Bool[Array, "g s"]
    made: Bool[Array, "g s k"] | None = None  # choices that a token makes, where their number varies
    own: Any = None  # what a router tells its own losses


Sums = tuple[Float[Array, "..."], ...]
"""Over tokens, so that those of groups, devices and micro-batches add up."""


class Loss(abc.ABC):
    """A scalar of what a router decided for a whole batch: the ``value`` of sums. Two sums are a total and the tokens
    that it is over: their ratio. Losses are frozen dataclasses, so that a layer that holds one can be hashed.
    """

    @abc.abstractmethod
    def sums(self, gating: Gating) -> Sums: ...

    def value(self, sums: Sums) -> Float[Array, ""]:
        return sums[0] / jnp.maximum(sums[1], 1.0) if len(sums) == 2 else evenness(*sums)

    def __call__(self, gating: Gating) -> Float[Array, ""]:
        return self.value(self.sums(gating))


@dataclasses.dataclass(frozen=True)
class BalanceLoss(Loss):
    """``E * sum_e f_e p_e``: f_e expert e's share of the choices, p_e its mean gate.

    choices "first" counts first choices only (GShard, Algorithm 1 line 13; Switch, arXiv 2101.03961 eq. 4), "all"
    counts all k (Mixtral, OLMoE, Qwen, DeepSeek's expert-level loss). over "group" balances each group of tokens on its
    own and averages by their real tokens: with sequences as groups it is DeepSeek-V3's sequence-wise loss (arXiv
    2412.19437 eq. 17). over "batch" takes f over the whole batch on all devices (arXiv 2501.11873): sequences may
    specialise.
    """

    choices: Literal["first", "all"] = "all"
    over: Literal["group", "batch"] = "group"

    def sums(self, gating: Gating) -> Sums:
        share, gate, tokens = shares(gating, 1 if self.choices == "first" else gating.experts.shape[-1])
        if self.over == "batch":
            return share.sum(0), gate.sum(0), tokens.sum()
        return jnp.sum(evenness(share, gate, tokens) * tokens), tokens.sum()


@dataclasses.dataclass(frozen=True)
class ZLoss(Loss):
    """``mean logsumexp(logits)**2`` over real tokens (ST-MoE, arXiv 2202.08906 eq. 5): keeps logits small."""

    def sums(self, gating: Gating) -> Sums:
        real = gating.valid.astype(jnp.float32)
        return jnp.sum(jax.nn.logsumexp(gating.logits, axis=-1) ** 2 * real), real.sum()


def evenness(share: Float[Array, "*g e"], gate: Float[Array, "*g e"], tokens: Float[Array, "*g"]) -> Float[Array, "*g"]:
    """``e * sum_e share_e gate_e / tokens**2``: 1.0 where either is even and shares add up to ``tokens``."""
    return share.shape[-1] * jnp.sum(share * gate, axis=-1) / jnp.maximum(tokens, 1.0) ** 2


def shares(gating: Gating, k: int) -> tuple[Float[Array, "g e"], Float[Array, "g e"], Float[Array, "g"]]:
    """Of each group: each expert's share of the first ``k`` choices, 1 a token; its summed gates; and real tokens."""
    real = gating.valid.astype(jnp.float32)
    made = jnp.ones((*real.shape, k)) if gating.made is None else gating.made[..., :k].astype(jnp.float32)
    counts = real[..., None] * made * (k / jnp.maximum(made.sum(-1, keepdims=True), 1.0))
    number, experts = jnp.arange(gating.gates.shape[-1], dtype=jnp.int32), gating.experts
    chosen = sum(jnp.where(experts[..., i, None] == number, counts[..., i, None], 0.0).sum(1) for i in range(k))
    return jnp.asarray(chosen) / k, jnp.einsum("gse,gs->ge", gating.gates, real), real.sum(1)
