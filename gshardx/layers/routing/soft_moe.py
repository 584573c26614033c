"""Soft MoE (Puigcerver et al., arXiv 2308.00951): nothing is chosen; slots are filled with mixtures of tokens.

    z = (x / |x|) . (scale * phi_n / |phi_n|)             fp32; slot n = e p + j is expert e's j-th; scale is
                                                          learned, and 1 at first
    D = softmax of z over the group's tokens;  slot n's input = sum_t D_tn x_t
    C = softmax of z over all slots;           y_t = sum_n C_tn f_n

Every token is in every slot and every slot in every output: nothing is dropped, no load is uneven, and all of it is
differentiable. Padding has no part in any slot.

In the terms of :class:`Routing` a token has a choice for each slot: ``weights`` are C, ``input_weights`` D. Its
statistics count the parts of tokens in slots, which add up to 1 a slot.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from gshardx.errors import BadInput
from gshardx.layers.balance import Gating
from gshardx.layers.param import fan_in_normal, param
from gshardx.layers.routing.choice import Capacity
from gshardx.layers.routing.common import RouterBase
from gshardx.layers.routing.contract import RouterState, Routing
from gshardx.layers.routing.cosine import unit
from gshardx.layers.routing.statistics import count
from gshardx.sharding import shard


@dataclasses.dataclass(frozen=True)
class Fixed(Capacity):
    """``minimum`` slots for a group of any size."""

    def slots(self, tokens: int, num_experts: int, top_k: int, training: bool) -> int:
        return self.minimum


class SoftMoERouter(RouterBase):
    """Every token goes to all experts. Args, beside those of :class:`RouterBase`, of which ``priority`` and
    ``output_masking`` are left as they are:

    width: m.
    slots: p, of an expert for a group.
    capacity: not looked at: a slot has parameters of its own, so their number can't follow the group's tokens.
    """

    MIXES = True

    def __init__(
        self,
        width: int,
        num_experts: int,
        *,
        slots: int = 1,
        capacity: Capacity | None = None,
        rngs: nnx.Rngs,
        **common: Any,
    ) -> None:
        if slots < 1:
            raise BadInput(f"slots = {slots}: must be 1 or more; use 1, or tokens * k / experts for the cost of k")
        for name, plain in (("priority", "position"), ("output_masking", 0.0)):
            if common.get(name, plain) != plain:
                raise BadInput(f"{name} = {common[name]}: every token is in every slot of soft_moe; leave {name} out")
        super().__init__(num_experts, num_experts, capacity=Fixed(minimum=slots), **common)
        columns = (width, num_experts * slots)
        self.kernel = param(rngs.params(), "embed router", columns, fan_in_normal(width))
        self.scale = param(rngs.params(), "router", (1,), jax.nn.initializers.ones)
        self.slots = slots

    @property
    def leak(self) -> str | None:
        return "slots mix all tokens of a row, later ones too"

    def choices(self, training: bool) -> int:
        return self.num_experts * self.slots

    def logits(self, tokens: Float[Array, "g s m"]) -> Float[Array, "g s n"]:
        """Of the e p slots, expert by expert; fp32."""
        columns = self.scale[...] * unit(shard(self.kernel[...], "model router"), axis=0)
        directions = unit(tokens.astype(jnp.float32), axis=-1)
        return jnp.einsum("gsm,mn->gsn", directions, columns, precision=jax.lax.Precision.HIGHEST)

    def __call__(
        self, tokens: Float[Array, "g s m"], valid: Bool[Array, "g s"], rng: Array | None, state: RouterState = ()
    ) -> Routing:
        logits = self.logits(tokens)
        real = valid[..., None]
        parts = jax.nn.softmax(jnp.where(real, logits, jnp.finfo(logits.dtype).min), axis=1) * real
        weights = jax.nn.softmax(logits, axis=-1)
        by_expert = (*valid.shape, self.num_experts, self.slots)
        number = jnp.broadcast_to(jnp.arange(self.num_experts, dtype=jnp.int32)[:, None], by_expert)
        place = jnp.broadcast_to(jnp.arange(self.slots, dtype=jnp.int32), by_expert)
        gating = Gating(logits, weights.reshape(by_expert).sum(-1), number[..., 0], valid)
        sums = {name: loss.sums(gating) for name, loss in self.losses}
        taken = jax.lax.stop_gradient(parts)
        load = taken.reshape(by_expert).sum((1, 3))
        return Routing(
            experts=number.reshape(logits.shape),
            slots=place.reshape(logits.shape),
            keep=jnp.broadcast_to(real, logits.shape),
            weights=weights * real,
            input_weights=parts,
            losses={name: loss.value(sums[name]) for name, loss in self.losses},
            loss_sums=sums,
            stats=count(logits, gating.gates, taken.sum(-1, keepdims=True), real, load, valid, self.slots),
            state=state,
            num_experts=self.num_experts,
            capacity=self.slots,
            mixed=True,
        )
