"""Further losses of the literature; conventions as in layers/balance.py."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from gshardx.layers.balance import Gating, Loss, Sums, shares


@dataclasses.dataclass(frozen=True)
class DeviceLoss(Loss):
    """DeepSeekMoE's device-level loss (arXiv 2401.06066 eq. 15): :class:`BalanceLoss` over the batch, between
    ``devices`` equal parts of the experts."""

    devices: int

    def sums(self, gating: Gating) -> Sums:
        share, gate, tokens = (x.sum(0) for x in shares(gating, gating.experts.shape[-1]))
        return share.reshape(self.devices, -1).sum(-1), gate.reshape(self.devices, -1).sum(-1), tokens


@dataclasses.dataclass(frozen=True)
class CommunicationLoss(DeviceLoss):
    """DeepSeek-V2's communication loss (arXiv 2405.04434 eq. 29): evens what each of ``devices`` parts of the experts
    receives. A token that chose several experts of a part is sent there once; at most ``limit`` parts get a token. 1.0
    if all parts receive alike and every token goes to ``limit`` of them; less if tokens go to fewer.
    """

    limit: int

    def sums(self, gating: Gating) -> Sums:
        size = gating.gates.shape[-1] // self.devices
        part = jnp.arange(self.devices, dtype=jnp.int32)
        sent = (gating.experts[..., None] // size == part).any(-2) & gating.valid[..., None]
        _, gate, tokens = super().sums(gating)
        return sent.astype(jnp.float32).sum((0, 1)) / self.limit, gate, tokens


@dataclasses.dataclass(frozen=True)
class ImportanceLoss(Loss):
    """Squared coefficient of variation of the experts' gates, summed over the batch (arXiv 1701.06538 eq. 6)."""

    def sums(self, gating: Gating) -> Sums:
        return (shares(gating, 1)[1].sum(0),)

    def value(self, sums: Sums) -> Float[Array, ""]:
        return cv_squared(*sums)


@dataclasses.dataclass(frozen=True)
class LoadLoss(ImportanceLoss):
    """The same of a smooth load, in V-MoE's form (arXiv 2106.05974 appendix A): each expert's chance to reach the k-th
    best logit with Gaussian noise of this ``deviation`` on its own. At best 0.
    """

    deviation: float

    def sums(self, gating: Gating) -> Sums:
        threshold = jnp.sort(gating.logits, axis=-1)[..., -gating.experts.shape[-1], None]
        chance = jax.scipy.stats.norm.cdf((gating.logits - threshold) / self.deviation)
        return (jnp.sum(chance * gating.valid[..., None], axis=(0, 1)),)


def cv_squared(values: Float[Array, "e"]) -> Float[Array, ""]:
    """Variance over squared mean."""
    return values.var() / jnp.maximum(values.mean() ** 2, 1e-20)
