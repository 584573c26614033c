"""Rotary position embedding (RoFormer, arXiv 2104.09864), in the half-split form of GPT-NeoX and Llama."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def rotate(x: Float[Array, "b t n d"], positions: Int[Array, "b t"], base: float) -> Float[Array, "b t n d"]:
    """Turn each pair (x[i], x[i + d/2]) by ``positions * base**(-2i/d)`` radians. Computed in fp32, returned as given.

    d must be even.
    """
    half = x.shape[-1] // 2
    frequency = base ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = positions[:, :, None, None].astype(jnp.float32) * frequency
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
