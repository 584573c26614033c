"""Prompts in, tokens out: fixed batches through two compiled steps, prefill and decode."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from gshardx.errors import BadInput
from gshardx.models.build import Blueprint, Variables
from gshardx.models.decode import DecodeState, Sampling, abstract_state, decode_step, extend
from gshardx.sharding import CompiledStep, abstract_array, one_program_at_a_time
from gshardx.sharding.distributed import fetch


class SamplingOptions(NamedTuple):
    """How to draw; temperature 0 takes the best token, top_k 0 and top_p 1.0 cut nothing."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0


class Emitted(NamedTuple):
    """One token of one prompt."""

    prompt: int
    token: int


Prefill = CompiledStep[[Variables, DecodeState, jax.Array, jax.Array], DecodeState]
Decode = CompiledStep[[Variables, DecodeState, Sampling, jax.Array], tuple[DecodeState, jax.Array]]


def compile_prefill(blueprint: Blueprint, mesh: Mesh, *, length: int, rows: int, chunk: int) -> Prefill:
    """Compile the step that appends ``chunk`` tokens of prompt to each row; a row holds at most ``length``."""
    state = abstract_state(blueprint, rows, length, mesh)
    tokens = abstract_array((rows, chunk), jnp.int32, ["batch", "time"], mesh, tensor="rows")

    def prefill(variables: Variables, state: DecodeState, tokens: jax.Array, count: jax.Array) -> DecodeState:
        return extend(blueprint, variables, state, tokens, count)

    return CompiledStep(
        prefill,
        (blueprint.variables, state, tokens, _by_row("int32", rows, mesh)),
        mesh,
        donate=(1,),
        out_shardings=jax.tree.map(lambda a: a.sharding, state),
    )


def compile_decode(blueprint: Blueprint, mesh: Mesh, *, length: int, rows: int) -> Decode:
    """Compile the step that draws and appends one token to each active row."""
    state = abstract_state(blueprint, rows, length, mesh)
    how = Sampling(*(_by_row(dtype, rows, mesh) for dtype in ("float32", "int32", "float32", "uint32")))

    def decode(
        variables: Variables, state: DecodeState, how: Sampling, active: jax.Array
    ) -> tuple[DecodeState, jax.Array]:
        return decode_step(blueprint, variables, state, how, active)

    return CompiledStep(
        decode,
        (blueprint.variables, state, how, _by_row("bool", rows, mesh)),
        mesh,
        donate=(1,),
        out_shardings=(jax.tree.map(lambda a: a.sharding, state), _by_row("int32", rows, mesh).sharding),
    )


def _by_row(dtype: str, rows: int, mesh: Mesh) -> Any:
    """An abstract value a row."""
    return abstract_array((rows,), jnp.dtype(dtype), ["batch"], mesh, tensor="rows")


class Generator:
    """Compiles prefill and decode once; then generates for any prompts, in batches of ``rows``.

    Args:
        blueprint: the model.
        variables: its values, on ``mesh``.
        mesh: where to run.
        length: longest prompt and continuation together, tokens.
        rows: sequences in a batch; a multiple of the mesh's batch shards.
        chunk: prompt tokens in one call of prefill.
    """

    def __init__(
        self, blueprint: Blueprint, variables: Variables, mesh: Mesh, *, length: int, rows: int, chunk: int = 64
    ) -> None:
        self.length, self.rows, self.chunk = length, rows, min(chunk, length)
        self._variables = variables
        self._abstract = abstract_state(blueprint, rows, length, mesh)
        self._wait = one_program_at_a_time(mesh)
        self.prefill = compile_prefill(blueprint, mesh, length=length, rows=rows, chunk=self.chunk)
        self.decode = compile_decode(blueprint, mesh, length=length, rows=rows)
        self._by_row = _by_row("int32", rows, mesh).sharding
        self._by_row_token = self.prefill.input_shardings[2]

    def generate(
        self, prompts: Sequence[np.ndarray], max_new_tokens: int, options: SamplingOptions, end: int | None = None
    ) -> Iterator[Emitted]:
        """Yield tokens as they are drawn, prompts of a batch in turn; a prompt stops after its ``end`` token.

        Raises:
            BadInput: an empty prompt, or one that does not fit with ``max_new_tokens``.
        """
        for index, prompt in enumerate(prompts):
            if len(prompt) == 0:
                raise BadInput(f"prompt {index + 1} is empty; give at least one character")
            if len(prompt) + max_new_tokens > self.length:
                raise BadInput(
                    f"prompt {index + 1} has {len(prompt)} tokens; with --max_new_tokens {max_new_tokens} that is over "
                    f"the length of {self.length}; shorten one of them or raise --max_length"
                )
        for first in range(0, len(prompts), self.rows):
            yield from self._batch(first, prompts[first : first + self.rows], max_new_tokens, options, end)

    def _batch(
        self, first: int, prompts: Sequence[np.ndarray], max_new_tokens: int, options: SamplingOptions, end: int | None
    ) -> Iterator[Emitted]:
        state = self._prefilled(prompts)
        active = np.arange(self.rows) < len(prompts)
        how = Sampling(
            self._put(np.full(self.rows, options.temperature, np.float32)),
            self._put(np.full(self.rows, options.top_k, np.int32)),
            self._put(np.full(self.rows, options.top_p, np.float32)),
            self._put(np.full(self.rows, options.seed, np.uint32)),
        )
        for _ in range(max_new_tokens):
            if not active.any():
                return
            state, drawn = self.decode(self._variables, state, how, self._put(active))
            tokens = fetch(drawn)
            for row in np.flatnonzero(active):
                if tokens[row] == end:
                    active[row] = False
                else:
                    yield Emitted(first + int(row), int(tokens[row]))
            self._settle(state)

    def _prefilled(self, prompts: Sequence[np.ndarray]) -> DecodeState:
        state = jax.tree.map(lambda a: jax.device_put(np.zeros(a.shape, a.dtype), a.sharding), self._abstract)
        longest = max(map(len, prompts))
        for start in range(0, longest, self.chunk):
            tokens = np.zeros((self.rows, self.chunk), np.int32)
            count = np.zeros(self.rows, np.int32)
            for row, prompt in enumerate(prompts):
                piece = prompt[start : start + self.chunk]
                tokens[row, : len(piece)] = piece
                count[row] = len(piece)
            state = self.prefill(self._variables, state, jax.device_put(tokens, self._by_row_token), self._put(count))
            self._settle(state)
        return state

    def _settle(self, state: DecodeState) -> None:
        if self._wait:
            jax.block_until_ready(state)

    def _put(self, values: np.ndarray) -> jax.Array:
        return jax.device_put(values, self._by_row)
