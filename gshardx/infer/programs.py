"""Every program that an engine runs, compiled before its first request."""

import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from gshardx.infer.buffer import Layout
from gshardx.infer.program import (
    DeviceState,
    Sizes,
    abstract_state,
    admit,
    decode,
    decode_layout,
    everywhere,
    result_layout,
    step,
    step_layout,
)
from gshardx.models.build import Blueprint, Variables
from gshardx.sharding import CompiledStep


class Call:
    """A compiled program with the layouts of what it is given and what it returns."""

    def __init__(self, program: CompiledStep[..., Any], given: Layout, result: Layout, mesh: Mesh) -> None:
        self.program, self.given, self.result = program, given, result
        self._place = everywhere(mesh)

    def blank(self) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """A buffer of zeros, and its fields to fill in."""
        buffer = np.zeros(self.given.words, np.int32)
        return buffer, self.given.views(buffer)

    def __call__(self, variables: Variables, state: DeviceState, buffer: np.ndarray) -> tuple[DeviceState, jax.Array]:
        """Start it; the result travels to the host meanwhile."""
        state, result = self.program(variables, state, jax.device_put(buffer, self._place))
        result.copy_to_host_async()
        return state, result


class Programs:
    """``step`` for each bucket of tokens, ``decode`` for each bucket of rows, and ``admit``.

    Args:
        tokens: buckets of ``step``, tokens of a shard.
        rows: buckets of ``decode``, rows of a shard.
        samples: places of a shard where ``step`` may draw.
    """

    def __init__(
        self, blueprint: Blueprint, sizes: Sizes, mesh: Mesh, *, tokens: Sequence[int], rows: Sequence[int],
        samples: int,
    ) -> None:  # fmt: skip
        start = time.perf_counter()
        state = abstract_state(blueprint, sizes, mesh)
        places = jax.tree.map(lambda a: a.sharding, state)
        whole = everywhere(mesh)

        def compiled(function: Callable[..., Any], given: Layout, steps: int, width: int) -> Call:
            result = result_layout(sizes, steps, width, blueprint.vocab)

            def run(variables: Variables, state: DeviceState, buffer: jax.Array) -> tuple[DeviceState, jax.Array]:
                state, found = function(blueprint, sizes, variables, state, given.unpack(buffer))
                return state, result.pack(found)

            run.__name__ = f"{function.__name__}_{width}"
            buffer = jax.ShapeDtypeStruct((given.words,), jnp.int32, sharding=whole)
            program = CompiledStep(
                run, (blueprint.variables, state, buffer), mesh, donate=(1,), out_shardings=(places, whole)
            )
            return Call(program, given, result, mesh)

        def of_tokens(count: int) -> Call:
            return compiled(step, step_layout(sizes, count, min(count, samples)), 1, min(count, samples))

        def of_rows(count: int) -> Call:
            return compiled(decode, decode_layout(sizes, count), sizes.steps, count)

        def admission() -> CompiledStep[..., DeviceState]:
            number = jax.ShapeDtypeStruct((), jnp.int32, sharding=whole)
            rows = [
                jax.ShapeDtypeStruct((blueprint.vocab,), jnp.dtype(t), sharding=whole) for t in ("int32", "float32")
            ]
            return CompiledStep(admit, (state, number, number, *rows), mesh, donate=(0,), out_shardings=places)

        with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
            steps = {count: pool.submit(of_tokens, count) for count in tokens}
            decodes = {count: pool.submit(of_rows, count) for count in rows}
            self.admit = pool.submit(admission).result()
            self.steps = {count: future.result() for count, future in steps.items()}
            self.decodes = {count: future.result() for count, future in decodes.items()}
        self.abstract_state, self.seconds = state, time.perf_counter() - start

    def step_for(self, tokens: int) -> Call:
        """The smallest that holds so many tokens."""
        return self.steps[min(count for count in self.steps if count >= tokens)]

    def decode_for(self, rows: int) -> Call:
        """The smallest that holds so many rows."""
        return self.decodes[min(count for count in self.decodes if count >= rows)]

    def initial_state(self) -> DeviceState:
        """Zeros."""
        state: DeviceState = jax.tree.map(
            lambda a: jax.device_put(np.zeros(a.shape, a.dtype), a.sharding), self.abstract_state
        )
        return state

    def __len__(self) -> int:
        return len(self.steps) + len(self.decodes) + 1
