"""Every program that an engine runs, compiled before its first request, and held against each other.

A request meets one program or another as others come and go, so all must give the same bits. Which sizes of a matrix
product do depends on the backend's kernels, the model's shapes and versions: it is tried, not assumed
(:meth:`Programs.agree`).
"""

import dataclasses
import os
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from gshardx.infer.buffer import Layout
from gshardx.infer.exchange import Exchange
from gshardx.infer.program import (
    DeviceState,
    Sizes,
    abstract_state,
    admit,
    constrain,
    decode,
    decode_layout,
    everywhere,
    mask_words,
    result_layout,
    step,
    step_layout,
)
from gshardx.infer.sampling import TOP
from gshardx.infer.settings import EngineConfig
from gshardx.models.build import Blueprint, Variables
from gshardx.sharding import CompiledStep
from gshardx.sharding.distributed import fetch
from gshardx.sharding.kept import KeptSteps

OPTIONS = {"cpu": {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT"}}
"""Of XLA's compilers. By default its CPU compiler gives sums over rows, and what stands around a matrix product, to one
library where there are many rows and to another where there are few, and these round otherwise (jax 0.10 and 0.12)."""

PROBES = 12
"""Tokens that :func:`probe` computes, each with 21 numbers; where kernels differ, many of them do."""


class Call:
    """A compiled program with the layouts of what it is given and what it returns."""

    def __init__(
        self, program: CompiledStep[..., Any], given: Layout, result: Layout, sizes: Sizes, mesh: Mesh
    ) -> None:
        self.program, self.given, self.result, self.sizes = program, given, result, sizes
        self._place = everywhere(mesh)

    def blank(self) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """A buffer without tokens, and its fields to fill in."""
        buffer = np.zeros(self.given.words, np.int32)
        given = self.given.views(buffer)
        for name, value in (("position", -1), ("target", -1), ("repetition", 1.0), ("top_p", 1.0)):  # nothing there
            if name in given:
                given[name][:] = value
        return buffer, given

    def __call__(self, variables: Variables, state: DeviceState, buffer: np.ndarray) -> tuple[DeviceState, jax.Array]:
        """Start it; the result travels to the host meanwhile."""
        state, result = self.program(variables, state, jax.device_put(buffer, self._place))
        result.copy_to_host_async()
        return state, result


class Programs:
    """``step`` for each bucket of tokens, ``decode`` for each bucket of rows, ``admit`` and ``constrain``.

    Args:
        tokens: buckets of ``step``, tokens of a shard.
        rows: buckets of ``decode``, rows of a shard.
        samples: places of a shard where ``step`` may draw; of more than a tile, a multiple of it.
        exchange: how the model's tokens reach their experts.
        drafter: the same parameters in a model that computes less; its ``decode`` is compiled as well.
    """

    def __init__(
        self, blueprint: Blueprint, sizes: Sizes, mesh: Mesh, *, tokens: Sequence[int], rows: Sequence[int],
        samples: int, exchange: Exchange, drafter: Blueprint | None = None,
    ) -> None:  # fmt: skip
        start = time.perf_counter()
        state = abstract_state(blueprint, sizes, mesh)
        places = jax.tree.map(lambda a: a.sharding, state)
        whole = everywhere(mesh)
        described = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype, leaf.sharding.spec), blueprint.variables)
        facts = (
            blueprint.config,
            blueprint.vocab,
            exchange,
            described,
            drafter and drafter.config,
            sizes,
            samples,
            OPTIONS,
        )
        kept = KeptSteps(mesh, repr(facts))

        def compiled(
            name: str, model: Blueprint, function: Callable[..., Any], given: Layout, steps: int, width: int
        ) -> Call:
            result = result_layout(sizes, steps, width, model)

            def run(variables: Variables, state: DeviceState, buffer: jax.Array) -> tuple[DeviceState, jax.Array]:
                state, found = function(model, sizes, variables, state, given.unpack(buffer))
                return state, result.pack(found)

            run.__name__ = name
            buffer = jax.ShapeDtypeStruct((given.words,), jnp.int32, sharding=whole)
            program = kept.get(
                name,
                lambda: CompiledStep(
                    run,
                    (blueprint.variables, state, buffer),
                    mesh,
                    donate=(1,),
                    out_shardings=(places, whole),
                    options=OPTIONS.get(mesh.devices.flat[0].platform),
                ),
            )
            return Call(program, given, result, sizes, mesh)

        def of_tokens(count: int) -> Call:
            places = min(count, samples)
            return compiled(f"step_{count}", blueprint, step, step_layout(sizes, count, places), 1, places)

        def of_rows(count: int, model: Blueprint = blueprint) -> Call:
            name = f"decode_{count}" if model is blueprint else f"draft_{count}"
            return compiled(name, model, decode, decode_layout(sizes, count), sizes.steps, count)

        def of_a_slot(function: Callable[..., DeviceState], *rows: tuple[int, str]) -> CompiledStep[..., DeviceState]:
            number = jax.ShapeDtypeStruct((), jnp.int32, sharding=whole)
            described = [jax.ShapeDtypeStruct((length,), jnp.dtype(kind), sharding=whole) for length, kind in rows]
            given = (state, number, number, *described)
            return kept.get(
                function.__name__, lambda: CompiledStep(function, given, mesh, donate=(0,), out_shardings=places)
            )

        with kept.making(), ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
            steps = {count: pool.submit(of_tokens, count) for count in tokens}
            decodes = {count: pool.submit(of_rows, count) for count in rows}
            drafts = {count: pool.submit(of_rows, count, drafter) for count in rows} if drafter else {}
            self.admit = pool.submit(
                of_a_slot, admit, (blueprint.vocab, "int32"), (blueprint.vocab, "float32")
            ).result()
            self.constrain = pool.submit(of_a_slot, constrain, (mask_words(blueprint.vocab), "uint32")).result()
            self.steps = {count: future.result() for count, future in steps.items()}
            self.decodes = {count: future.result() for count, future in decodes.items()}
            self.drafts = {count: future.result() for count, future in drafts.items()}
        self.abstract_state, self.seconds = state, time.perf_counter() - start

    def agree(self, variables: Variables) -> bool:
        """Leave out small programs whose bits are not those of the largest; False where the two largest differ.

        Leaves the pages of an engine's state dirty, as they may be.
        """
        state = self.initial_state()
        calls = [*self.steps.items(), *self.decodes.items()]
        found = []
        for _, call in calls:
            state, bits = probe(call, variables, state)
            found.append(bits)
        bits_of = dict(zip([id(call) for _, call in calls], found, strict=True))
        largest = bits_of[id(self.decodes[max(self.decodes)])]
        if bits_of[id(self.steps[max(self.steps)])] != largest:
            return False
        for buckets in (self.steps, self.decodes):
            for count in [count for count, call in buckets.items() if bits_of[id(call)] != largest]:
                del buckets[count]
        return True

    def step_for(self, tokens: int) -> Call:
        """The smallest that holds so many tokens."""
        return self.steps[min(count for count in self.steps if count >= tokens)]

    def decode_for(self, rows: int) -> Call:
        """The smallest that holds so many rows."""
        return self.decodes[min(count for count in self.decodes if count >= rows)]

    def draft_for(self, rows: int) -> Call:
        """The smallest that holds so many rows."""
        return self.drafts[min(count for count in self.drafts if count >= rows)]

    def initial_state(self) -> DeviceState:
        """Zeros."""
        state: DeviceState = jax.tree.map(
            lambda a: jax.device_put(np.zeros(a.shape, a.dtype), a.sharding), self.abstract_state
        )
        return state

    def __len__(self) -> int:
        return len(self.steps) + len(self.decodes) + len(self.drafts) + 2


def agreeing_programs(
    blueprint: Blueprint,
    variables: Variables,
    mesh: Mesh,
    config: EngineConfig,
    exchange: Exchange,
    drafter: Blueprint | None = None,
) -> tuple[Programs, Sizes]:
    """Programs of ``config``, with a smaller tile if that is what it takes for all to give the same bits."""
    while True:
        sizes, samples = config.sizes(mesh), config.samples()
        programs = Programs(
            blueprint, sizes, mesh, tokens=config.token_buckets(), rows=config.row_buckets(), samples=samples,
            exchange=exchange, drafter=drafter,
        )  # fmt: skip
        if programs.agree(variables):
            return programs, sizes
        if config.tile == 2:
            warnings.warn("XLA's programs differ here: last digits depend on who else is served", stacklevel=3)
            return programs, sizes
        config = dataclasses.replace(config, tile=max(2, config.tile // 2))


def probe(call: Call, variables: Variables, state: DeviceState) -> tuple[DeviceState, bytes]:
    """What a program makes of a sequence that is the same for all: the bits of the best scores after each token.

    It is computed alone, and last among others whose pages nobody keeps, in turn: experts take few rows otherwise than
    many (:mod:`gshardx.layers.merged_experts`), and a kernel may treat its last rows otherwise than its first.
    """
    found = []
    nobody, vocab = state.last.shape[1] - 1, state.bias.shape[2]
    for position in range(PROBES):
        buffer, given = call.blank()
        last, rows = given["position"].shape[1] - 1, given["table"].shape[1]
        at, row = (0, 0) if position % 2 else (last, rows - 1)
        first = 0 if rows > 1 else at  # of a single row there are no others
        given["position"][:, first : at + 1] = position
        given["token"][:, first : at + 1] = (17 * position + 5 + 3 * (at - np.arange(first, at + 1))) % vocab
        given["slot"][:] = nobody
        given["alternatives"][:] = TOP
        given["table"][:, row] = np.arange(1, 1 + given["table"].shape[2])
        given["longest"][...] = 1 + position // call.sizes.page_size
        for name, value in (("sample_slot", nobody), ("steps", 1), ("limit", 1), ("sample_tiles", 1)):
            if name in given:
                given[name][...] = value
        place = at
        if "sample" in given:
            place = 0
            given["sample"][:, 0], given["sample_row"][:, 0], given["row"][:, at] = at, row, row
            given["tiles"][...] = -(-(at + 1) // min(call.sizes.tile, last + 1))
        state, result = call(variables, state, buffer)
        numbers = call.result.views(fetch(result))
        found += [numbers[name][0, :, place].tobytes() for name in ("logprob", "best_logprob")]
    return state, b"".join(found)
