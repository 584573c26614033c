"""Several processes, one program: what they tell each other outside compiled steps.

With one process every function here is a plain call.
"""

from collections.abc import Callable
from typing import TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gshardx.errors import BadInput
from gshardx.sharding.compile import CompiledStep
from gshardx.sharding.mesh import one_program_at_a_time

T = TypeVar("T")

_MESSAGE_BYTES = 1024


def together(action: Callable[[], T]) -> T:
    """Call ``action`` on every process; if it raises BadInput on one, raise it on all, none waiting for another.

    A collective call: every process must make it.
    """
    if jax.process_count() == 1:
        return action()
    result, error = None, None
    try:
        result = action()
    except BadInput as raised:
        error = raised
    said = exchange("" if error is None else str(error))
    if error is not None:
        raise error
    for process, text in enumerate(said):
        if text:
            raise BadInput(f"process {process}: {text}")
    return cast(T, result)


def exchange(text: str) -> list[str]:
    """What each process says, in their order; a text of at most 1,024 bytes, cut there. A collective call."""
    if jax.process_count() == 1:
        return [text]
    mine = np.zeros(_MESSAGE_BYTES, np.uint8)
    words = np.frombuffer(text.encode()[:_MESSAGE_BYTES], np.uint8)
    mine[: len(words)] = words
    rows = multihost_utils.process_allgather(mine)
    return [bytes(row).rstrip(b"\0").decode(errors="ignore") for row in rows]


def on_first(action: Callable[[], T]) -> T | None:
    """Call ``action`` on process 0 while the others wait; they get None, and its BadInput. A collective call."""
    return together(lambda: action() if jax.process_index() == 0 else None)


def fetch(array: jax.Array) -> np.ndarray:
    """The whole of an array on this host, wherever its shards lie. A collective call unless they lie here."""
    if array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(array)
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))


class Largest:
    """The largest of the processes' numbers, one call late, so that steps on accelerators can run ahead.

    With one process, its own number at once.
    """

    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh
        self._pending: jax.Array | None = None
        if jax.process_count() > 1:
            self._place = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
            abstract = jax.ShapeDtypeStruct((mesh.size,), jnp.int32, sharding=self._place)
            self._program = CompiledStep(jnp.max, (abstract,), mesh)

    def __call__(self, number: int) -> int:
        """A collective call."""
        if jax.process_count() == 1:
            return number
        before = 0 if self._pending is None else int(self._pending)
        numbers = jax.make_array_from_callback((self._mesh.size,), self._place, lambda _: np.array([number], np.int32))
        self._pending = self._program(numbers)
        if one_program_at_a_time(self._mesh):
            jax.block_until_ready(self._pending)
        return before
