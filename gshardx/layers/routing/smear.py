"""SMEAR (Muqeeth et al., arXiv 2306.03745): one merged expert for each row, by the mean of its tokens.

    v = mean of the row's real tokens                     fp32
    R = softmax(LayerNorm(v) W)
    the row goes through one network with the weights sum_e R_e theta_e

No expert is chosen, so that every expert and the router have exact gradients. ``expert_dropout``, in training: each
expert is left out of a row with that probability, and R divided by what is left of it (by the authors' code, which adds
1e-10 to each share, so that a row whose experts are all left out has their plain mean).
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from gshardx.errors import BadInput
from gshardx.layers.draws import draw
from gshardx.layers.norm import LayerNorm
from gshardx.layers.routing.contract import RouterState, Routing
from gshardx.layers.routing.merging import MergingRouter, mean_of_stretches

_EPSILON = 1e-10


class SmearRouter(MergingRouter):
    """Args, beside those of :class:`MergingRouter`:

    expert_dropout: chance of an expert to be left out of a row's mixture in training.
    """

    def __init__(
        self, width: int, num_experts: int, *, expert_dropout: float = 0.0, rngs: nnx.Rngs, **common: Any
    ) -> None:
        super().__init__(width, num_experts, num_experts, rngs=rngs, **common)
        if not 0 <= expert_dropout < 1:
            raise BadInput(f"expert_dropout = {expert_dropout}: must be 0 or more and below 1; use 0.1")
        self.expert_dropout = expert_dropout
        self.norm = LayerNorm(width, rngs=rngs)

    def __call__(
        self, tokens: Float[Array, "g s m"], valid: Bool[Array, "g s"], rng: Array | None, state: RouterState = ()
    ) -> Routing:
        means, some = mean_of_stretches(tokens, valid, tokens.shape[1])
        logits = self.logits(self.norm(means))
        gates = jax.nn.softmax(logits, axis=-1)
        if rng is not None and self.expert_dropout:
            rate = self.expert_dropout
            left_out = draw(lambda key, shape: jax.random.bernoulli(key, rate, shape), rng, gates.shape)
            gates = jnp.where(left_out, 0.0, gates) + _EPSILON
            gates = gates / gates.sum(-1, keepdims=True)
        return self.merged(self.everyone(logits, gates, some), gates, valid, rng=rng)
