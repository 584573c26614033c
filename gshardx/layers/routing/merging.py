"""What routers share that merge experts' weights instead of sending tokens: one network for a stretch of a row."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from gshardx.errors import BadInput
from gshardx.layers.balance import Gating
from gshardx.layers.routing.choice import Capacity
from gshardx.layers.routing.contract import Routing
from gshardx.layers.routing.linear import LinearRouter
from gshardx.layers.routing.statistics import count


class MergingRouter(LinearRouter):
    """Base of routers for :class:`gshardx.layers.Blending`; not one itself.

    Losses weigh each merged network alike. Statistics count one choice a token, the network that it goes through, and
    an expert's load is how much of it is in those of all tokens. Nothing is dropped, so ``capacity`` is not looked at.
    Dispatchers that send tokens would mix experts' outputs instead of their weights.

    Args: those of :class:`LinearRouter`, without ``output_masking``, as no expert has an output.
    """

    def __init__(
        self,
        width: int,
        num_experts: int,
        top_k: int,
        *,
        capacity: Any = None,
        output_masking: float = 0.0,
        **common: Any,
    ) -> None:
        if output_masking:
            raise BadInput(f"output_masking = {output_masking}: merged experts have no outputs of their own; use 0")
        super().__init__(width, num_experts, top_k, capacity=Capacity(None), **common)

    @property
    def leak(self) -> str | None:
        return "experts are merged by the mean of a row's tokens, later ones too"

    def stretch(self, group: int) -> int:
        return group

    def merged(
        self, gating: Gating, weights: Float[Array, "g n k"], valid: Bool[Array, "g s"], rng: Array | None
    ) -> Routing:
        """Of the decisions for n stretches, ``gating`` ``[g, n, ...]``, whose gates are the mixtures; ``weights`` are
        those of the chosen."""
        (g, s), n = valid.shape, weights.shape[1]
        by_stretch = self.route(gating, weights, rng=rng)
        logits, gates, experts, weights = (
            jnp.repeat(x, s // n, axis=1) for x in (gating.logits, gating.gates, gating.experts, weights)
        )
        keep = jnp.broadcast_to(valid[..., None], experts.shape)
        one = keep & (jnp.arange(experts.shape[-1]) == 0)
        load = jnp.einsum("gse,gs->ge", gates, valid.astype(gates.dtype))
        return dataclasses.replace(
            by_stretch,
            experts=experts,
            slots=jnp.broadcast_to(jnp.arange(s, dtype=jnp.int32)[:, None], experts.shape),
            keep=keep,
            weights=weights * keep,
            stats=count(logits, gates, one, one, load, valid, s)._replace(room=jnp.float32(g * s)),
            stretch=s // n,
            capacity=s,
        )

    def everyone(
        self, logits: Float[Array, "g n e"], gates: Float[Array, "g n e"], valid: Bool[Array, "g n"]
    ) -> Gating:
        """The decision to merge all experts by ``gates``."""
        experts = jnp.broadcast_to(jnp.arange(self.num_experts, dtype=jnp.int32), gates.shape)
        return Gating(logits, gates, experts, valid)


def mean_of_stretches(
    values: Float[Array, "g s d"], valid: Bool[Array, "g s"], stretch: int
) -> tuple[Float[Array, "g n d"], Bool[Array, "g n"]]:
    """Means over the real tokens of each ``stretch``, fp32, 0 where there are none; and whether there are some."""
    g, s, d = values.shape
    real = valid.reshape(g, s // stretch, stretch).astype(jnp.float32)
    total = jnp.einsum("gnld,gnl->gnd", values.reshape(*real.shape, d).astype(jnp.float32), real, precision="highest")
    tokens = real.sum(-1)
    return total / jnp.maximum(tokens, 1.0)[..., None], tokens > 0
