"""Plain top-k routing, as public models have it, each a setting of the same few options.

    model               softmax   renormalise   bias    scale    groups
    Mixtral, MiniMax    before    yes
    OLMoE, Qwen2-MoE    before    no
    Qwen3-MoE           before    yes
    Granite             after     -
    GPT-OSS             after     -             yes
    DeepSeek-V2         before    no                    16.0     8, of which 3
    MoEfication         none      -             yes

Softmax "before" the choice is over all experts; "after" it, over the chosen logits, which equals "before" with
renormalisation. With "none" each chosen expert weighs 1 (arXiv 2110.01786), and only losses teach the router.

With ``round_to`` training rounds each expert's count of tokens in a group (layers/routing/rounding.py), so that a
choice hangs on the whole group there; inference is plain. Choices weigh what they would without it, those that were
added their gate by the same divisor, and losses see the choices before.
"""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from gshardx.errors import BadInput
from gshardx.layers.balance import Gating
from gshardx.layers.routing.choice import Capacity, best_groups, check_groups, take, top_k
from gshardx.layers.routing.contract import RouterState, Routing
from gshardx.layers.routing.linear import LinearRouter, normalised
from gshardx.layers.routing.rounding import check_tile, rounded


class TopKRouter(LinearRouter):
    """Args, beside those of :class:`LinearRouter` (bias is GPT-OSS's):

    softmax: over all experts "before" the choice, or over the chosen ones "after" it; "none": weights of 1.
    renormalise: divide the weights by their sum (with softmax "before").
    scale: factor on the weights.
    groups: equal parts that the experts are divided into (by device); 1: no limit.
    groups_kept: a token chooses within this many parts, those with the best single expert.
    round_to: tokens of an expert in a group are a multiple of it in training; 1: as many as choose it.
    """

    def __init__(
        self,
        width: int,
        num_experts: int,
        top_k: int,
        *,
        softmax: Literal["before", "after", "none"] = "before",
        renormalise: bool = True,
        scale: float = 1.0,
        groups: int = 1,
        groups_kept: int = 1,
        round_to: int = 1,
        capacity: Capacity = Capacity(),  # noqa: B008 (frozen)
        **common: Any,
    ) -> None:
        check_groups(num_experts, top_k, groups, groups_kept)
        if round_to < 1:
            raise BadInput(f"round_to = {round_to}: must be 1 or more; SonicMoE has 128, the rows of its tiles")
        if round_to > 1:
            factor = None if capacity.factor is None else capacity.factor * top_k / num_experts  # of all experts
            capacity = dataclasses.replace(capacity, factor=factor, tile=round_to)
        super().__init__(width, num_experts, top_k, capacity=capacity, **common)
        self.softmax, self.renormalise, self.scale = softmax, renormalise, scale
        self.groups, self.groups_kept, self.round_to = groups, groups_kept, round_to

    def choices(self, training: bool) -> int:
        """All experts where tokens may be added to any."""
        return self.num_experts if training and self.round_to > 1 else self.top_k

    def __call__(
        self, tokens: Float[Array, "g s m"], valid: Bool[Array, "g s"], rng: Array | None, state: RouterState = ()
    ) -> Routing:
        return self.choose(self.logits(tokens), valid, rng)

    def choose(self, logits: Float[Array, "g s e"], valid: Bool[Array, "g s"], rng: Array | None) -> Routing:
        gates = jax.nn.softmax(logits, axis=-1)
        open_to = best_groups(logits, self.groups, self.groups_kept, best_of=1)
        experts = top_k(jnp.where(open_to, logits, jnp.finfo(logits.dtype).min), self.choices(rng is not None))
        weights = take(gates, experts)
        plain = Gating(logits, gates, experts[..., : self.top_k], valid)
        if self.softmax == "after":
            chosen = take(logits, experts)
            total = jax.nn.logsumexp(chosen[..., : self.top_k], axis=-1, keepdims=True)
            weights = jnp.exp(jnp.minimum(chosen - total, 0.0))  # above 0: only of experts outside groups_kept
        elif self.softmax == "none":
            weights = jnp.ones_like(weights)
        elif self.renormalise:
            weights = normalised(weights, over=self.top_k)
        wanted = None
        if rng is not None and self.round_to > 1:
            wanted = self._rounded(plain, open_to, experts)
        gating = plain._replace(experts=experts)
        return self.route(gating, weights * self.scale, rng=rng, judged=plain, wanted=wanted)

    def _rounded(
        self, plain: Gating, open_to: Bool[Array, "g s e"], experts: Int[Array, "g s e"]
    ) -> Bool[Array, "g s e"]:
        """Which of a token's ``experts``, all of them, best first, take it."""
        check_tile(self.round_to, experts.shape[1], self.top_k, self.num_experts)
        real = plain.valid[..., None]
        chosen = (plain.experts[..., None] == jnp.arange(self.num_experts, dtype=jnp.int32)).any(-2) & real
        taken = rounded(chosen, open_to & real, plain.gates, self.round_to)
        return take(taken.astype(jnp.float32), experts) > 0
