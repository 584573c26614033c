"""Random numbers that belong to a row of the batch: the same however rows are split over devices and micro-batches."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key

from gshardx.errors import BadInput


def row_keys(rng: Array, rows: int) -> Key[Array, "b"]:
    """A key for each row (or group); ``rng`` itself if it already holds as many, else derived from the one it is.

    Raises:
        BadInput: ``rng`` holds several keys, and not one a row.
    """
    if not jnp.issubdtype(rng.dtype, jax.dtypes.prng_key):
        rng = jax.random.wrap_key_data(rng)
    if rng.ndim == 0:
        return folded(rng, jnp.arange(rows))
    if rng.shape != (rows,):
        raise BadInput(f"rng: keys of shape {rng.shape} for {rows} rows; pass one key, or one for each row")
    return rng


def folded(keys: Key[Array, "*b"], data: Array | int) -> Key[Array, "*b"]:
    """``jax.random.fold_in`` on arrays; ``data`` is broadcast against ``keys``."""
    return jnp.vectorize(jax.random.fold_in)(keys, jnp.asarray(data, jnp.uint32))


def group_keys(rows: Key[Array, "b"], t: int, s: int) -> Key[Array, "g"]:
    """A key for each group of ``s`` tokens, of the row of ``t`` tokens in which it starts."""
    together = math.lcm(t, s)  # tokens after which groups and rows start together again
    blocks = rows.reshape(-1, together // t)
    starts = range(0, together, s)
    return jnp.stack([folded(blocks[:, start // t], start % t) for start in starts], axis=1).reshape(-1)


def draw(sampler: Callable[[Array, tuple[int, ...]], Array], keys: Array, shape: tuple[int, ...]) -> Array:
    """``sampler(key, shape[1:])`` for each of ``shape[0]`` rows."""
    return jax.vmap(lambda key: sampler(key, shape[1:]))(row_keys(keys, shape[0]))


def dropout(x: Float[Array, "b t m"], keys: Array | None, rate: float) -> Float[Array, "b t m"]:
    """Zero a share ``rate`` of the entries and scale up the others (JMLR 15:1929); ``keys``: one a row, None to keep
    all."""
    if keys is None or rate == 0.0:
        return x
    keep = draw(lambda key, shape: jax.random.bernoulli(key, 1.0 - rate, shape), keys, x.shape)
    return jnp.where(keep, x / (1.0 - rate), 0.0).astype(x.dtype)


def thinned(valid: Bool[Array, "b t"], keys: Array | None, rate: float) -> Bool[Array, "b t"]:
    """``valid`` less a share ``rate`` of the entries; ``keys`` as :func:`dropout`'s."""
    return valid if keys is None or rate == 0.0 else valid & (draw(jax.random.uniform, keys, valid.shape) >= rate)
