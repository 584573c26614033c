"""The cosine router (X-MoE, arXiv 2204.09179) with the numbers of Tutel's: directions choose, lengths have no say.

    z_e = tau (x P / |x P|) . (w_e / |w_e|)               fp32; tau = exp(min(t, ln 100)), t learned from ln 2
    the choice and its weights as in top_k

P projects to few dimensions; there and on the sphere tokens do not collapse towards the experts' columns, which X-MoE
found of linear routers. A zero token or column has the cosine 0.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from gshardx.errors import BadInput
from gshardx.layers.param import fan_in_normal, param
from gshardx.layers.routing.top_k import TopKRouter
from gshardx.sharding import shard

_HIGHEST = math.log(100.0)
_SMALLEST = 1e-24
"""Squared length below which a vector is left as it is: its direction is noise, and would have a slope without end."""


class CosineRouter(TopKRouter):
    """Args, beside those of :class:`TopKRouter`:

    projection: dimensions of x P; 256 in Tutel.
    """

    def __init__(
        self,
        width: int,
        num_experts: int,
        top_k: int,
        *,
        projection: int = 256,
        rngs: nnx.Rngs,
        **common: Any,
    ) -> None:
        if projection < 1:
            raise BadInput(f"projection = {projection}: a cosine needs a dimension; use 256, or 1 or more")
        super().__init__(projection, num_experts, top_k, rngs=rngs, **common)
        self.projection = param(rngs.params(), "embed router", (width, projection), fan_in_normal(width))
        self.temperature = param(rngs.params(), "router", (1,), jax.nn.initializers.constant(math.log(1 / 0.5)))

    def logits(self, tokens: Float[Array, "g s m"]) -> Float[Array, "g s e"]:
        """fp32."""
        projected = unit(self.product(tokens, self.projection), axis=-1)
        cosines = self.product(projected, unit(shard(self.kernel[...], "model router"), axis=0))
        logits = cosines * jnp.exp(jnp.minimum(self.temperature[...], _HIGHEST))
        return logits if self.bias is None else logits + self.bias[...]


def unit(x: Float[Array, "*d"], axis: int) -> Float[Array, "*d"]:
    """Vectors along ``axis`` at length 1; those that are all but zero as they are."""
    square = jnp.sum(x * x, axis=axis, keepdims=True)
    return x * jax.lax.rsqrt(jnp.where(square > _SMALLEST, square, 1.0))
