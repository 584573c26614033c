"""DeepSeek-V3's routing (arXiv 2412.19437, section 2.1.2): sigmoid scores, balance by a bias that no gradient sees.

    s = sigmoid(x W)                                      fp32
    chosen: the k largest s + b, inside the groups_kept groups whose two best s + b have the largest sums
    w_i = scale * s_i / sum_chosen s                      b is not part of the weights
    after each step: b_e += rate * sign(mean load - load_e), loads counted over the whole mesh

The sequence-wise loss of the paper (eq. 17-20) is "balance" with sequences as groups; its gates are s / sum_e s, and it
counts the k largest s, without bias and groups: else it would fall silent once the bias has evened the loads. Llama 4
is ``top_k=1, renormalise=False, weigh="input", choose_by="logits"``: the weight multiplies the expert's input.
"""

import dataclasses
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from gshardx.layers.balance import Gating
from gshardx.layers.routing.choice import best_groups, check_groups, take, top_k
from gshardx.layers.routing.contract import Routing
from gshardx.layers.routing.linear import LinearRouter, normalised


class BiasState(NamedTuple):
    """bias: added to the scores for the choice only. load: choices of each expert since the last step, all devices."""

    bias: Float[Array, "e"]
    load: Float[Array, "e"]


class SigmoidBiasRouter(LinearRouter):
    """Args, beside those of :class:`LinearRouter`:

    renormalise: divide the scores of the chosen by their sum.
    scale: factor on the weights; 2.5 in DeepSeek-V3.
    groups, groups_kept: a token chooses within ``groups_kept`` of ``groups`` equal parts of the experts; 8 and 4 in
        DeepSeek-V3; 1: no limit.
    rate: of the bias; 0.001 in DeepSeek-V3.
    choose_by: "scores" and bias; or "logits" alone, which differ where large ones have the same sigmoid in fp32 (Llama
        4).
    weigh: whether weights multiply the experts' output or their input.
    """

    def __init__(
        self,
        width: int,
        num_experts: int,
        top_k: int,
        *,
        renormalise: bool = True,
        scale: float = 1.0,
        groups: int = 1,
        groups_kept: int = 1,
        rate: float = 0.001,
        weigh: Literal["output", "input"] = "output",
        choose_by: Literal["scores", "logits"] = "scores",
        **common: Any,
    ) -> None:
        check_groups(num_experts, top_k, groups, groups_kept)
        super().__init__(width, num_experts, top_k, **common)
        self.renormalise, self.scale = renormalise, scale
        self.groups, self.groups_kept = groups, groups_kept
        self.rate, self.weigh, self.choose_by = rate, weigh, choose_by

    def initial_state(self) -> BiasState:
        return BiasState(jnp.zeros(self.num_experts), jnp.zeros(self.num_experts))

    def after_step(self, state: BiasState) -> BiasState:
        return BiasState(bias_update(state.bias, state.load, self.rate), jnp.zeros_like(state.load))

    def __call__(
        self, tokens: Float[Array, "g s m"], valid: Bool[Array, "g s"], rng: Array | None, state: BiasState
    ) -> Routing:
        logits = self.logits(tokens)
        scores = jax.nn.sigmoid(logits)
        biased = scores + state.bias if self.choose_by == "scores" else logits
        open_to = best_groups(biased, self.groups, self.groups_kept, best_of=2)
        experts = top_k(jnp.where(open_to, biased, -jnp.inf), self.top_k)
        weights = take(scores, experts)
        if self.renormalise:
            weights = normalised(weights, 1e-20)
        gating = Gating(logits, normalised(scores, 1e-20), experts, valid)
        unbiased = gating._replace(experts=top_k(scores, self.top_k))  # the paper's eq. 18 counts these
        routing = self.route(gating, weights * self.scale, rng=rng, judged=unbiased)
        state = BiasState(state.bias, state.load + routing.stats.load)
        if self.weigh == "input":
            ones = routing.keep.astype(jnp.float32)
            return dataclasses.replace(routing, weights=ones, input_weights=routing.weights, state=state)
        return dataclasses.replace(routing, state=state)


def bias_update(bias: Float[Array, "e"], load: Float[Array, "e"], rate: float) -> Float[Array, "e"]:
    """``b + rate * sign(mean load - load)`` (arXiv 2408.15664 Algorithm 1; DeepSeek-V3 uses rate 0.001)."""
    return bias + rate * jnp.sign(load.mean() - load)
