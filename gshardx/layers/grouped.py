"""Grouped matrix multiplication: rows sorted by expert, each expert with its own matrix."""

import functools
import importlib.util
import warnings
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from gshardx.layers.blocked import blocked_matmul
from gshardx.sharding import backend


def grouped_matmul(
    rows: Float[Array, "r a"], weights: Float[Array, "e a b"], sizes: Int[Array, "e"]
) -> Float[Array, "r b"]:
    """``rows[i] @ weights[expert of i]``; the first ``sizes[0]`` rows are expert 0's, and so on. Rows after the last
    become 0. On accelerators tokamax where it is installed, else ``jax.lax.ragged_dot``; on CPUs blocks.
    """
    if backend() == "cpu":
        return blocked_matmul(rows, weights, sizes)
    if has_fast_kernel(backend()):
        return _without_rest(_tokamax_ragged_dot()(rows, weights, sizes), sizes)
    if backend() == "gpu":
        _warn_about_gpus()
    return _without_rest(jax.lax.ragged_dot(rows, weights, sizes), sizes)


def _without_rest(out: Float[Array, "r b"], sizes: Int[Array, "e"]) -> Float[Array, "r b"]:
    """0 after the last expert's rows, where a kernel may leave anything."""
    return jnp.where(jnp.arange(len(out))[:, None] < sizes.sum(), out, 0)


def has_fast_kernel(on: str) -> bool:
    """Whether :func:`grouped_matmul` is much faster on backend ``on`` than a product for every expert and token."""
    return on == "cpu" or importlib.util.find_spec("tokamax") is not None


@functools.cache
def _tokamax_ragged_dot() -> Callable[..., Array]:
    from absl import flags

    # tokamax 0.0.12 reads absl's flags, which would otherwise parse the command line and stumble over the user's own.
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
    import tokamax

    found: Callable[..., Array] = tokamax.ragged_dot
    return found


@functools.cache
def _warn_about_gpus() -> None:
    # tokamax's tuning tables for an H100: 9.2 ms against 1.5 ms for Mixtral's up projection of 8,192 rows.
    warnings.warn(
        "XLA's ragged_dot is several times slower than a grouped GEMM on GPUs: pip install tokamax", stacklevel=4
    )
