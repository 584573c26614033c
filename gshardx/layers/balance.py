"""Losses and updates that keep the experts' loads even.

One convention: a balance loss is 1.0 a layer at perfect balance, whatever the number of experts, choices, groups or
devices (layers/conventions.py converts others). Shares count choices before any is dropped, gradients flow through the
mean gates alone, and padding counts nowhere.
"""

import dataclasses
from typing import Literal, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


class Gating(NamedTuple):
    """What losses see of a router's decision."""

    logits: Float[Array, "g s e"]
    gates: Float[Array, "g s e"]
    """fp32; a distribution over experts."""
    experts: Int[Array, "g s k"]
    valid: Bool[Array, "g s"]


class Loss(Protocol):
    """A scalar from a router's decision. Losses are frozen dataclasses, so that a layer that holds one can be
    hashed.
    """

    def __call__(self, gating: Gating) -> Float[Array, ""]: ...


@dataclasses.dataclass(frozen=True)
class BalanceLoss:
    """``E * sum_e f_e p_e``: f_e expert e's share of the choices, p_e its mean gate.

    choices "first" counts first choices only (GShard, Algorithm 1 line 13; Switch, arXiv 2101.03961 eq. 4), "all"
    counts all k (Mixtral, OLMoE, Qwen, DeepSeek's expert-level loss). over "group" balances each group of tokens on its
    own and averages by their real tokens: with sequences as groups it is DeepSeek-V3's sequence-wise loss (arXiv
    2412.19437 eq. 17). over "batch" takes f over the whole batch on all devices (arXiv 2501.11873): sequences may
    specialise.
    """

    choices: Literal["first", "all"] = "all"
    over: Literal["group", "batch"] = "group"

    def __call__(self, gating: Gating) -> Float[Array, ""]:
        experts = gating.experts[..., :1] if self.choices == "first" else gating.experts
        num_experts = gating.gates.shape[-1]
        chosen, gate, tokens = _sums(gating, experts)
        if self.over == "batch":
            chosen, gate, tokens = (x.sum(0, keepdims=True) for x in (chosen, gate, tokens))
        each = jnp.maximum(tokens, 1.0)
        share = chosen / (each * experts.shape[-1])[:, None]
        per_group = num_experts * jnp.sum(share * gate / each[:, None], axis=-1)
        return jnp.sum(per_group * tokens) / jnp.maximum(tokens.sum(), 1.0)


@dataclasses.dataclass(frozen=True)
class DeviceLoss:
    """DeepSeekMoE's device-level loss (arXiv 2401.06066 eq. 15): :class:`BalanceLoss` between ``devices`` equal parts
    of the experts instead of experts, over the batch.
    """

    devices: int

    def __call__(self, gating: Gating) -> Float[Array, ""]:
        chosen, gate, tokens = (x.sum(0) for x in _sums(gating, gating.experts))
        each = jnp.maximum(tokens, 1.0)
        share = chosen.reshape(self.devices, -1).sum(-1) / (each * gating.experts.shape[-1])
        return self.devices * jnp.sum(share * gate.reshape(self.devices, -1).sum(-1) / each)


@dataclasses.dataclass(frozen=True)
class CommunicationLoss:
    """DeepSeek-V2's communication loss (arXiv 2405.04434 eq. 29): evens what each of ``devices`` parts of the experts
    receives. A token that chose several experts of a part is sent there once; at most ``limit`` parts get a token. 1.0
    if all parts receive alike and every token goes to ``limit`` of them; less if tokens go to fewer.
    """

    devices: int
    limit: int

    def __call__(self, gating: Gating) -> Float[Array, ""]:
        size = gating.gates.shape[-1] // self.devices
        part = jnp.arange(self.devices, dtype=jnp.int32)
        sent = (gating.experts[..., None] // size == part).any(-2) & gating.valid[..., None]
        _, gate, tokens = (x.sum(0) for x in _sums(gating, gating.experts))
        each = jnp.maximum(tokens, 1.0)
        received = self.devices / (self.limit * each) * sent.astype(jnp.float32).sum((0, 1))
        return jnp.sum(received * gate.reshape(self.devices, -1).sum(-1) / each)


@dataclasses.dataclass(frozen=True)
class ZLoss:
    """``mean logsumexp(logits)**2`` over real tokens (ST-MoE, arXiv 2202.08906 eq. 5): keeps logits small."""

    def __call__(self, gating: Gating) -> Float[Array, ""]:
        real = gating.valid.astype(jnp.float32)
        z = jax.nn.logsumexp(gating.logits, axis=-1) ** 2
        return jnp.sum(z * real) / jnp.maximum(real.sum(), 1.0)


@dataclasses.dataclass(frozen=True)
class ImportanceLoss:
    """Squared coefficient of variation of the experts' gates, summed over the batch (arXiv 1701.06538 eq. 6)."""

    def __call__(self, gating: Gating) -> Float[Array, ""]:
        return cv_squared(_sums(gating, gating.experts)[1].sum(0))


@dataclasses.dataclass(frozen=True)
class LoadLoss:
    """Squared coefficient of variation of a smooth load, in V-MoE's form (arXiv 2106.05974 appendix A): each expert's
    chance to reach the k-th best logit with Gaussian noise of this ``deviation`` on its own. At best 0.
    """

    deviation: float

    def __call__(self, gating: Gating) -> Float[Array, ""]:
        threshold = jnp.sort(gating.logits, axis=-1)[..., -gating.experts.shape[-1], None]
        chance = jax.scipy.stats.norm.cdf((gating.logits - threshold) / self.deviation)
        return cv_squared(jnp.sum(chance * gating.valid[..., None], axis=(0, 1)))


def cv_squared(values: Float[Array, "e"]) -> Float[Array, ""]:
    """Variance over squared mean."""
    return values.var() / jnp.maximum(values.mean() ** 2, 1e-20)


def _sums(
    gating: Gating, experts: Int[Array, "g s k"]
) -> tuple[Float[Array, "g e"], Float[Array, "g e"], Float[Array, "g"]]:
    """Of each group: choices and summed gates of each expert, and real tokens."""
    real = gating.valid.astype(jnp.float32)
    number = jnp.arange(gating.gates.shape[-1], dtype=jnp.int32)
    chosen = sum(
        jnp.where(experts[..., rank, None] == number, real[..., None], 0.0).sum(1) for rank in range(experts.shape[-1])
    )
    return jnp.asarray(chosen), jnp.einsum("gse,gs->ge", gating.gates, real), real.sum(1)


def bias_update(bias: Float[Array, "e"], load: Float[Array, "e"], rate: float) -> Float[Array, "e"]:
    """``b + rate * sign(mean load - load)`` (arXiv 2408.15664 Algorithm 1; DeepSeek-V3 uses rate 0.001)."""
    return bias + rate * jnp.sign(load.mean() - load)


def adapt_coefficient(
    coefficient: Float[Array, "*layer"],
    drop_fraction: Float[Array, "*layer"],
    slope: float = 0.2,
    highest: float = 0.01,
    decay: float = 0.99,
) -> Float[Array, "*layer"]:
    """Skywork-MoE's adaptive coefficient (arXiv 2406.06563 section 3.2, whose values are the defaults): a moving
    average of ``min(slope * drop_fraction, highest)``, one a layer.
    """
    return decay * coefficient + (1 - decay) * jnp.minimum(slope * drop_fraction, highest)
