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
"""

from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from gshardx.layers.balance import Gating
from gshardx.layers.routing.choice import best_groups, check_groups, take, top_k
from gshardx.layers.routing.contract import RouterState, Routing
from gshardx.layers.routing.linear import LinearRouter, normalised


class TopKRouter(LinearRouter):
    """Args, beside those of :class:`LinearRouter` (bias is GPT-OSS's):

    softmax: over all experts "before" the choice, or over the chosen ones "after" it; "none": weights of 1.
    renormalise: divide the weights by their sum (with softmax "before").
    scale: factor on the weights.
    groups: equal parts that the experts are divided into (by device); 1: no limit.
    groups_kept: a token chooses within this many parts, those with the best single expert.
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
        **common: Any,
    ) -> None:
        check_groups(num_experts, top_k, groups, groups_kept)
        super().__init__(width, num_experts, top_k, **common)
        self.softmax, self.renormalise, self.scale = softmax, renormalise, scale
        self.groups, self.groups_kept = groups, groups_kept

    def __call__(
        self, tokens: Float[Array, "g s m"], valid: Bool[Array, "g s"], rng: Array | None, state: RouterState = ()
    ) -> Routing:
        logits = self.logits(tokens)
        gates = jax.nn.softmax(logits, axis=-1)
        open_to = best_groups(logits, self.groups, self.groups_kept, best_of=1)
        experts = top_k(jnp.where(open_to, logits, -jnp.inf), self.top_k)
        weights = take(gates, experts)
        if self.softmax == "after":
            weights = jax.nn.softmax(take(logits, experts), axis=-1)
        elif self.softmax == "none":
            weights = jnp.ones_like(weights)
        elif self.renormalise:
            weights = normalised(weights)
        return self.route(Gating(logits, gates, experts, valid), weights * self.scale, rng=rng)
