"""Random numbers of routers."""

import math
from collections.abc import Callable

from jaxtyping import Array


def drawn(draw: Callable[[Array, tuple[int, ...]], Array], rng: Array, shape: tuple[int, ...]) -> Array:
    """``draw(rng, shape)``, the same numbers, counted in one dimension.

    JAX counts along each dimension. Where there are as many groups as tokens in one, XLA takes both counts for one, and
    gathers it over the whole mesh in every layer (jax 0.10 for TPUs: benchmarks/scaling_ops.py, 1,024 of each).
    """
    return draw(rng, (math.prod(shape),)).reshape(shape)
