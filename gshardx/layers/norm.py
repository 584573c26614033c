"""Root mean square normalisation (arXiv 1910.07467), and layer normalisation (arXiv 1607.06450)."""

from collections.abc import Mapping
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from gshardx.layers.param import param


class RMSNorm(nnx.Module):
    """Scale ``[..., m]`` to unit mean square over m, then by a learned vector. Computed in fp32.

    Args:
        width: m, or the sizes of several last dimensions that are normalised as one.
        axes: their logical names.
        epsilon: added to the mean square.
    """

    def __init__(
        self, width: int | tuple[int, ...], axes: str = "model", *, rngs: nnx.Rngs, epsilon: float = 1e-6
    ) -> None:
        shape = (width,) if isinstance(width, int) else width
        self.scale = param(rngs.params(), axes, shape, jax.nn.initializers.ones)
        self.over = tuple(range(-len(shape), 0))
        self.epsilon = epsilon

    def __call__(self, x: Float[Array, "*b m"], dtype: DTypeLike | None = None) -> Float[Array, "*b m"]:
        """Returned as ``dtype``; default: as given."""
        x32 = x.astype(jnp.float32)
        inverse = jax.lax.rsqrt(jnp.mean(x32 * x32, axis=self.over, keepdims=True) + self.epsilon)
        return (x32 * inverse * self.scale[...]).astype(dtype or x.dtype)


class LayerNorm(nnx.Module):
    """Shift ``[..., m]`` to zero mean over m, scale it to unit variance, then by a learned vector, and add another.
    Computed in fp32.

    Args:
        width: m.
        epsilon: added to the variance.
    """

    def __init__(self, width: int, *, rngs: nnx.Rngs, epsilon: float = 1e-6) -> None:
        self.scale = param(rngs.params(), "model", (width,), jax.nn.initializers.ones)
        self.bias = param(rngs.params(), "model", (width,), jax.nn.initializers.zeros)
        self.epsilon = epsilon

    def __call__(self, x: Float[Array, "*b m"], dtype: DTypeLike | None = None) -> Float[Array, "*b m"]:
        """Returned as ``dtype``; default: as given."""
        x32 = x.astype(jnp.float32)
        centered = x32 - x32.mean(axis=-1, keepdims=True)
        inverse = jax.lax.rsqrt(jnp.mean(centered * centered, axis=-1, keepdims=True) + self.epsilon)
        return (centered * inverse * self.scale[...] + self.bias[...]).astype(dtype or x.dtype)


Norm = Literal["rms", "layer"]
NORMS: Mapping[Norm, type[RMSNorm] | type[LayerNorm]] = {"rms": RMSNorm, "layer": LayerNorm}
"""Of the residual stream."""
