"""The Mixture-of-Experts layer: route, dispatch, experts, combine."""

import math
from typing import NamedTuple

import jax
from flax import nnx
from jaxtyping import Array, Bool, Float

from gshardx.layers.dispatch import Dispatcher
from gshardx.layers.experts import Experts
from gshardx.layers.routing import Router, RouterStats
from gshardx.sharding import shard


class MoEMetrics(NamedTuple):
    """One layer's auxiliary loss (1.0 at perfect balance) and statistics; leading layer axis once stacked."""

    aux_loss: Float[Array, "*layer"]
    stats: RouterStats


def expert_capacity(tokens: int, num_experts: int, top_k: int, capacity_factor: float) -> int:
    """Slots an expert has for a group of ``tokens``: ``ceil(factor * k * s / e)``, at most s, at least 1.

    GShard's C = 2 S / E (arXiv 2006.16668 section 2.2) at factor 1 and k = 2. No expert can be chosen twice by a
    token, so more than s slots would stay empty.
    """
    return max(1, min(tokens, math.ceil(capacity_factor * top_k * tokens / num_experts)))


class MoE(nnx.Module):
    """``[b, t, m] -> ([b, t, m], MoEMetrics)``.

    Args:
        router: who.
        dispatcher: how.
        experts: what.
        capacity_factor: room of each expert in training, as a multiple of an even share.
        top_k: choices a token makes.
        group_size: tokens that compete for slots; divides b * t. None: each sequence is a group.
    """

    def __init__(
        self,
        router: Router,
        dispatcher: Dispatcher,
        experts: Experts,
        *,
        num_experts: int,
        top_k: int,
        capacity_factor: float,
        group_size: int | None = None,
    ) -> None:
        self.router = router
        self.dispatcher = dispatcher
        self.experts = experts
        self.num_experts = num_experts
        self.top_k = top_k
        self.capacity_factor = capacity_factor
        self.group_size = group_size

    def __call__(
        self, x: Float[Array, "b t m"], valid: Bool[Array, "b t"], rng: Array | None
    ) -> tuple[Float[Array, "b t m"], MoEMetrics]:
        """Padding (``valid`` False) takes no slot and returns 0.

        With ``rng`` None (inference) each row is its own group and has a slot for every choice: nothing is dropped, and
        a token's output depends on no other token.
        """
        b, t, m = x.shape
        s = t if rng is None else self.group_size or t
        capacity = s if rng is None else expert_capacity(s, self.num_experts, self.top_k, self.capacity_factor)
        tokens = shard(x.reshape(b * t // s, s, m), "group token model")
        with jax.named_scope("gate"):
            routing = self.router(tokens, valid.reshape(-1, s), rng, capacity)
        with jax.named_scope("dispatch"):
            expert_in = self.dispatcher.dispatch(tokens, routing)
        expert_out = self.experts(expert_in)
        with jax.named_scope("combine"):
            out = self.dispatcher.combine(expert_out, routing)
        return shard(out.reshape(b, t, m), "batch time model"), MoEMetrics(routing.aux_loss, routing.stats)
