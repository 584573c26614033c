"""GShard's group-level gating with capacity (arXiv 2006.16668, section 2.2 and Algorithm 1), generalised to top-k.

    g = softmax(x W)                          over all experts, fp32
    e_1..e_k = the k largest gates            w_i = g_i / (g_1 + ... + g_k)
    slots: first choices of the whole group, in token order, then second choices, ...
    choice i is kept if its slot is below the capacity and, for i >= 2 and policy "random", with probability
    min(1, w_i / threshold)

Where lingvo's code (gshard_layers.py, Top2GatingOnLogits) and the paper differ, both are options;
docs/routers/gshard.md says which is the default and why.
"""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from gshardx.layers.balance import BalanceLoss, Gating, ZLoss
from gshardx.layers.draws import draw, folded, row_keys
from gshardx.layers.routing.choice import take, top_k
from gshardx.layers.routing.contract import RouterState, Routing
from gshardx.layers.routing.linear import LinearRouter, normalised

SecondExpert = Literal["all", "sampling", "random"]


class GShardRouter(LinearRouter):
    """Args, beside those of :class:`LinearRouter`:

    second_expert: of choices after the first, in training: "all" takes the best and keeps each that finds a slot;
        "random" tosses the paper's coin for each; "sampling" draws them from the softmax without the first (Gumbel).
    threshold: weight from which "random" keeps a choice for sure; 0.5 is the paper's 2 * g2.
    slots: whether a choice that the coin rejected keeps its slot from others ("paper") or not ("lingvo").
    normalise: gates are divided by their sum over all choices ("before" dropping, the paper's), or over those kept
        ("after"). The coin sees the gate as it is then.
    """

    LOSSES = {"balance": BalanceLoss(choices="first"), "z": ZLoss()}  # noqa: RUF012

    def __init__(
        self,
        width: int,
        num_experts: int,
        top_k: int = 2,
        second_expert: SecondExpert = "all",
        *,
        threshold: float = 0.5,
        slots: Literal["paper", "lingvo"] = "paper",
        normalise: Literal["before", "after"] = "before",
        **common: Any,
    ) -> None:
        super().__init__(width, num_experts, top_k, **common)
        self.second_expert, self.threshold = second_expert, threshold
        self.slots, self.normalise = slots, normalise

    def __call__(
        self,
        tokens: Float[Array, "g s m"],
        valid: Bool[Array, "g s"] | Float[Array, "g s"],
        rng: Array | None,
        state: RouterState = (),
    ) -> Routing:
        """Route ``tokens``.

        ``valid`` may be lingvo's importance instead of a mask: a token of importance 1 makes all its choices; one below
        1 makes one choice less, its best experts queueing with the others' second and later choices; 0 is padding.
        Losses see tokens of importance 1 only.
        """
        importance = valid.astype(jnp.float32)
        first, others = importance == 1.0, importance > 0.0
        logits = self.logits(tokens)
        gates = jax.nn.softmax(logits, axis=-1)
        choice_rng, coin_rng = (None, None) if rng is None else (folded(row_keys(rng, len(tokens)), i) for i in (0, 1))
        experts = self._choose(logits, first, choice_rng)
        wanted = jnp.stack([first] + [others] * (self.top_k - 1), axis=-1)
        weights = take(gates, experts) * wanted
        if self.normalise == "before":
            weights = normalised(weights)
        accepted = self._accept(jax.lax.stop_gradient(weights), coin_rng)
        if self.slots == "lingvo":
            wanted &= accepted
        routing = self.route(
            Gating(logits, gates, experts, first),
            weights,
            rng=rng,
            counted=others,
            wanted=wanted,
            accepted=accepted,
        )
        if self.normalise == "after":
            total = routing.weights.sum(-1, keepdims=True)
            return dataclasses.replace(routing, weights=routing.weights / jnp.where(total > 0, total, 1.0))
        return routing

    def _choose(
        self, logits: Float[Array, "g s e"], first: Bool[Array, "g s"], rng: Array | None
    ) -> Int[Array, "g s k"]:
        """Tokens that are not ``first`` start with their second choice, which is then their best expert."""
        best = top_k(logits, self.top_k)
        if self.top_k == 1:
            return best
        later = best[..., 1:]
        from_best = best[..., :-1]
        if self.second_expert == "sampling" and rng is not None:
            drawn = logits + draw(jax.random.gumbel, rng, logits.shape)
            taken = best[..., :1] == jnp.arange(self.num_experts, dtype=jnp.int32)
            later = top_k(jnp.where(taken, -jnp.inf, drawn), self.top_k - 1)
            from_best = top_k(drawn, self.top_k - 1)
        return jnp.concatenate([best[..., :1], jnp.where(first[..., None], later, from_best)], axis=-1)

    def _accept(self, weights: Float[Array, "g s k"], rng: Array | None) -> Bool[Array, "g s k"]:
        if self.second_expert != "random" or rng is None:
            return jnp.ones(weights.shape, bool)
        coin = draw(jax.random.uniform, rng, weights.shape) < weights / max(self.threshold, 1e-9)
        return coin.at[..., 0].set(True)
