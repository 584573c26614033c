"""Routers with a linear gate: logits are the tokens times a matrix, fp32."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from gshardx.layers.param import param
from gshardx.layers.routing.common import RouterBase
from gshardx.sharding import shard


class LinearRouter(RouterBase):
    """Args, beside those of :class:`RouterBase`:

    width: m.
    bias: add a learned bias to the logits.
    """

    def __init__(
        self, width: int, num_experts: int, top_k: int, *, bias: bool = False, rngs: nnx.Rngs, **common: Any
    ) -> None:
        super().__init__(num_experts, top_k, **common)
        # N(0, 0.02) as in the Switch and flaxformer code: gates start near uniform.
        self.kernel = param(rngs.params(), "embed router", (width, num_experts), jax.nn.initializers.normal(0.02))
        self.bias = param(rngs.params(), "router", (num_experts,), jax.nn.initializers.zeros) if bias else None

    def logits(self, tokens: Float[Array, "g s m"]) -> Float[Array, "g s e"]:
        """fp32, whatever the tokens are."""
        logits = self.product(tokens, self.kernel)
        return logits if self.bias is None else logits + self.bias[...]

    def product(self, tokens: Float[Array, "g s m"], kernel: nnx.Param[Array] | Array) -> Float[Array, "g s e"]:
        """Of tokens with a matrix ``[m, e]``; fp32."""
        # Whole: on an fsdp x tensor mesh the partitioner would otherwise split it over ``tensor`` and move it twice.
        whole = shard(kernel[...], "model router")
        # By default accelerators would multiply in TF32 or bfloat16, and near ties fall otherwise on each.
        return jnp.einsum("gsm,me->gse", tokens.astype(jnp.float32), whole, precision=jax.lax.Precision.HIGHEST)


def normalised(weights: Float[Array, "g s k"], epsilon: float = 1e-9, over: int | None = None) -> Float[Array, "g s k"]:
    """Weights that add up to 1 over the choices, or over the first ones."""
    return weights / (weights[..., :over].sum(-1, keepdims=True) + epsilon)
