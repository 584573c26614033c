"""Root mean square normalisation (arXiv 1910.07467)."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from gshardx.layers.param import param


class RMSNorm(nnx.Module):
    """Scale ``[..., m]`` to unit mean square over m, then by a learned vector. Computed in fp32."""

    def __init__(self, width: int, axis: str = "model", *, rngs: nnx.Rngs, epsilon: float = 1e-6) -> None:
        self.scale = param(rngs.params(), axis, (width,), jax.nn.initializers.ones)
        self.epsilon = epsilon

    def __call__(self, x: Float[Array, "*b m"], dtype: DTypeLike | None = None) -> Float[Array, "*b m"]:
        """Returned as ``dtype``; default: as given."""
        x32 = x.astype(jnp.float32)
        inverse = jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.epsilon)
        return (x32 * inverse * self.scale[...]).astype(dtype or x.dtype)
