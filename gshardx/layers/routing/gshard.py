"""GShard's group-level gating with capacity (arXiv 2006.16668, section 2.2 and Algorithm 1), generalised to top-k.

    g = softmax(x W)                          over all experts, fp32
    e_1..e_k = the k largest gates            w_i = g_i / (g_1 + ... + g_k), before any is dropped
    slots: first choices of the whole group, in token order, then second choices, ...
    choice i is kept if its slot is below the capacity and, for i >= 2 and policy "random", with probability
    min(1, 2 w_i)

Lingvo's code differs from the paper in one outcome: there a choice rejected by the coin frees its slot.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from gshardx.layers.balance import first_choice_loss
from gshardx.layers.param import param
from gshardx.layers.routing.contract import Routing, assign_slots, statistics, take, top_k

SecondExpert = Literal["all", "random"]


class GShardRouter(nnx.Module):
    """Args: width m; num_experts e; top_k k; second_expert: "all" keeps every choice that finds a slot, "random" tosses
    the paper's coin for all but the first (in training only).
    """

    def __init__(
        self, width: int, num_experts: int, top_k: int, second_expert: SecondExpert = "all", *, rngs: nnx.Rngs
    ) -> None:
        # N(0, 0.02) as in the Switch and flaxformer code: gates start near uniform.
        self.kernel = param(rngs.params(), "embed router", (width, num_experts), jax.nn.initializers.normal(0.02))
        self.num_experts = num_experts
        self.top_k = top_k
        self.second_expert = second_expert

    def __call__(
        self, tokens: Float[Array, "g s m"], valid: Bool[Array, "g s"], rng: Array | None, capacity: int
    ) -> Routing:
        """Route ``tokens``; see the module's text for the rule and :class:`Routing` for the result."""
        logits = jnp.einsum("gsm,me->gse", tokens.astype(jnp.float32), self.kernel[...])
        gates = jax.nn.softmax(logits, axis=-1)
        experts = top_k(jax.lax.stop_gradient(gates), self.top_k)
        chosen = take(gates, experts)
        weights = chosen / (chosen.sum(-1, keepdims=True) + 1e-9)
        slots = assign_slots(experts, valid, self.num_experts)
        keep = (slots < capacity) & valid[..., None]
        if rng is not None and self.second_expert == "random":
            coin = jax.random.uniform(rng, weights.shape) < 2.0 * jax.lax.stop_gradient(weights)
            keep &= coin.at[..., 0].set(True)
        return Routing(
            experts=experts,
            slots=slots,
            keep=keep,
            weights=weights * keep,
            aux_loss=first_choice_loss(gates, experts[..., 0], valid),
            stats=statistics(experts, keep, valid, self.num_experts),
            num_experts=self.num_experts,
            capacity=capacity,
        )
