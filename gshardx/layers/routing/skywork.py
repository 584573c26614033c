"""Skywork-MoE's routing (arXiv 2406.06563, section 4.1): top-k of logits that are normalised first.

    z = x W                                               fp32
    z' = spread * (z - mean z) / std z                    over a token's experts, each token by itself
    g = softmax(z'), and the choice as in top_k

However small the logits are, gates are equally sharp, and ``spread`` says how sharp: without it gates that stay near
uniform make experts alike. The paper's other half, weights of the balance loss that follow each layer's drop rate, is
``model.moe.adaptive_balance``, for every router.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from gshardx.layers.routing.top_k import TopKRouter

_EPSILON = 1e-12
"""Added to the variance: logits that are all equal stay so. Initial ones are of the order of 0.02."""


class SkyworkRouter(TopKRouter):
    """Args, beside those of :class:`TopKRouter`:

    spread: standard deviation of a token's logits, lambda in the paper, which uses 1.
    """

    def __init__(self, width: int, num_experts: int, top_k: int, *, spread: float = 1.0, **common: Any) -> None:
        super().__init__(width, num_experts, top_k, **common)
        self.spread = spread

    def logits(self, tokens: Float[Array, "g s m"]) -> Float[Array, "g s e"]:
        """fp32, normalised."""
        plain = super().logits(tokens)
        centred = plain - plain.mean(-1, keepdims=True)
        deviation = jax.lax.rsqrt(jnp.mean(centred * centred, axis=-1, keepdims=True) + _EPSILON)
        return self.spread * centred * deviation
