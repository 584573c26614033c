"""Many small arrays in one buffer of 32-bit words, so that a call of the device takes one transfer."""

import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from gshardx.sharding import replicate


class Layout:
    """Named arrays one after the other.

    Args:
        fields: shape and dtype of each; a dtype of 32 bits.
    """

    def __init__(self, fields: Mapping[str, tuple[tuple[int, ...], str]]) -> None:
        self.fields = {name: (shape, np.dtype(dtype)) for name, (shape, dtype) in fields.items()}
        assert all(dtype.itemsize == 4 for _, dtype in self.fields.values())
        self.words = sum(math.prod(shape) for shape, _ in self.fields.values())

    def views(self, buffer: np.ndarray) -> dict[str, np.ndarray]:
        """Each field of an int32 ``[words]`` in host memory; writing to it writes to the buffer."""
        found, at = {}, 0
        for name, (shape, dtype) in self.fields.items():
            end = at + math.prod(shape)
            found[name] = buffer[at:end].view(dtype).reshape(shape)
            at = end
        return found

    def unpack(self, buffer: Int[Array, "words"]) -> dict[str, Array]:
        """The same on the device, whole: else the partitioner would split the buffer, and send its fields about."""
        found, at = {}, 0
        for name, (shape, dtype) in self.fields.items():
            end = at + math.prod(shape)
            found[name] = replicate(jax.lax.bitcast_convert_type(buffer[at:end], dtype).reshape(shape), name=name)
            at = end
        return found

    def pack(self, values: Mapping[str, Array]) -> Int[Array, "words"]:
        """On the device, what :meth:`views` reads on the host."""
        words = [
            jax.lax.bitcast_convert_type(values[name].astype(dtype), jnp.int32).reshape(-1)
            for name, (_, dtype) in self.fields.items()
        ]
        return jnp.concatenate(words)
