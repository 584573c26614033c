"""One function, lowered and compiled once for one mesh, and everything that is known about it."""

import dataclasses
import inspect
import pickle
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, Generic, ParamSpec, TypeVar

import jax
import numpy as np
from jax.experimental import serialize_executable
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import Mesh, Sharding

from gshardx.sharding.collectives import Collective, collectives
from gshardx.sharding.cost import matmul_flops
from gshardx.sharding.hlo import Program, parse

P = ParamSpec("P")
R = TypeVar("R")


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on each device while the program runs, as XLA allocated them."""

    arguments: int
    outputs: int
    aliased: int
    """Of the outputs that reuse donated arguments."""
    temporaries: int
    program: int
    """The code itself."""

    @property
    def peak(self) -> int:
        """All at once."""
        return self.arguments + self.outputs - self.aliased + self.temporaries + self.program


class ArgumentChanged(TypeError):
    """A compiled step was called with another shape, dtype, sharding or structure than it was compiled for."""


class ArgumentUsedUp(RuntimeError):
    """A compiled step was called with an array whose memory an earlier call was given (donated)."""


class CompiledStep(Generic[P, R]):
    """``function`` compiled ahead of time for the shapes and shardings of ``abstract``; it can never compile again.

    Every jitted function of the project is one: train, eval, prefill, decode.

    Args:
        function: the function; its arguments are positional pytrees of arrays.
        abstract: one pytree of ``jax.ShapeDtypeStruct`` (with shardings) or arrays per argument.
        mesh: the mesh that annotations inside ``function`` refer to; its devices need not exist (a topology).
        donate: indices of arguments whose buffers the outputs may reuse.
        out_shardings: shardings of the outputs; None lets the partitioner choose.
        options: XLA's, for this program alone.

    Attributes:
        executable: JAX's own object.
        lower_seconds: tracing and lowering.
        compile_seconds: XLA's part; little if the persistent cache had it.
    """

    def __init__(
        self,
        function: Callable[P, R],
        abstract: Sequence[Any],
        mesh: Mesh,
        donate: Sequence[int] = (),
        out_shardings: Any = None,
        options: Mapping[str, str] | None = None,
    ) -> None:
        self.name = getattr(function, "__name__", "function")
        self.mesh = mesh
        self.donated = tuple(donate)
        self._arguments = tuple(inspect.signature(function).parameters)
        start = time.perf_counter()
        with jax.set_mesh(mesh):
            jitted = jax.jit(function, donate_argnums=self.donated, out_shardings=out_shardings)
            lowered = jitted.lower(*abstract)
            middle = time.perf_counter()
            self.executable = lowered.compile(compiler_options=dict(options) if options else None)
        self._options = dict(options or {})
        settings: Any = jax.config
        self._may_be_cached = bool(settings.jax_enable_compilation_cache and settings.jax_compilation_cache_dir)
        self._lowered: jax.stages.Lowered | None = lowered
        self.lower_seconds, self.compile_seconds = middle - start, time.perf_counter() - middle

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Run.

        Raises:
            ArgumentChanged: another shape, dtype, sharding or structure; it names the argument. Nothing is compiled.
            ArgumentUsedUp: an array that an earlier call was given to reuse.
        """
        if any(isinstance(leaf, jax.Array) and leaf.is_deleted() for leaf in jax.tree.leaves(args)):
            raise ArgumentUsedUp(self._used_up(args))  # jax 0.10 ends the process instead
        try:
            result: R = self.executable(*args, **kwargs)
        except (TypeError, ValueError) as error:
            changed = list(self._changed(args))
            if not changed:
                raise
            raise ArgumentChanged(f"{self.name} was compiled once and does not compile again: {changed[0]}") from error
        return result

    def _changed(self, args: tuple[Any, ...]) -> Iterator[str]:
        """What differs from the arguments compiled for."""
        wanted = self.executable.in_avals[0]
        if len(args) != len(wanted):
            yield f"it takes {len(wanted)} arguments ({', '.join(self._arguments)}) and got {len(args)}"
            return
        places = self.input_shardings
        for name, abstract, given, place in zip(self._arguments, wanted, args, places, strict=False):
            if not _same_structure(abstract, given):
                yield f"{name} has another structure: {jax.tree.structure(given)}"
                continue
            shardings = jax.tree.leaves(place, is_leaf=lambda leaf: leaf is None)  # None: the function ignores it
            leaves = zip(jax.tree.leaves_with_path(abstract), jax.tree.leaves(given), shardings, strict=True)
            for (path, aval), leaf, sharding in leaves:
                where = name + jax.tree_util.keystr(path)
                if (np.shape(leaf), np.result_type(leaf)) != (aval.shape, aval.dtype):
                    yield f"{where} is {_typed(leaf)}; it was {_typed(aval)}"
                elif sharding is not None and isinstance(leaf, jax.Array) and _elsewhere(leaf, sharding):
                    yield f"{where} {_typed(leaf)} lies at {_placed(leaf.sharding)}; it was {_placed(sharding)}"

    def _used_up(self, args: tuple[Any, ...]) -> str:
        names = dict(zip(self._arguments, args, strict=False))
        gone = next(path for path, leaf in jax.tree.leaves_with_path(names) if leaf.is_deleted())
        return (
            f"{self.name}: {gone[0].key}{jax.tree_util.keystr(gone[1:])} was donated to an earlier call; "
            "pass on what that call returned"
        )

    @property
    def input_shardings(self) -> tuple[Any, ...]:
        """One pytree of shardings an argument."""
        return tuple(self.executable.input_shardings[0])

    @property
    def output_shardings(self) -> Any:
        """A pytree of shardings like the result."""
        return self.executable.output_shardings

    @property
    def stablehlo(self) -> str:
        """The program before XLA's optimisation.

        Raises:
            ValueError: the step was loaded.
        """
        if self._lowered is None:
            raise ValueError(f"{self.name} was loaded, and only the optimised program with it")
        return str(self._lowered.as_text())

    @cached_property
    def hlo(self) -> str:
        """The optimised HLO, as XLA prints it."""
        return str(self.executable.as_text())

    @cached_property
    def program(self) -> Program:
        """The optimised HLO, parsed."""
        return parse(self.hlo)

    @property
    def hlo_instructions(self) -> int:
        """How many instructions the optimised HLO has; constants do nothing and are not counted."""
        return self.program.instructions

    @cached_property
    def collectives(self) -> list[Collective]:
        """Everything that a run sends between devices."""
        return collectives(self.program, self.mesh)

    @cached_property
    def flops(self) -> int:
        """FLOPs of one device's matrix products in a run, loops counted as often as they turn."""
        return matmul_flops(self.program)

    @cached_property
    def memory(self) -> Memory:
        """Of one device."""
        found: Any = self.executable.memory_analysis()
        return Memory(
            arguments=found.argument_size_in_bytes,
            outputs=found.output_size_in_bytes,
            aliased=found.alias_size_in_bytes,
            temporaries=found.temp_size_in_bytes,
            program=found.generated_code_size_in_bytes,
        )

    def serialize(self) -> bytes:
        """The executable, to be loaded by :meth:`deserialize` on the same kind and number of devices and versions.

        On CPUs it is compiled again for that: what came from the persistent cache can't be written a second time (jax
        0.10 and 0.12: what is written then lacks functions, and fails with NOT_FOUND once loaded).

        Raises:
            ValueError: on CPUs, of a step that was itself loaded.
        """
        executable = self.executable
        if self.mesh.devices.flat[0].platform == "cpu" and self._may_be_cached:
            if self._lowered is None:
                raise ValueError(f"{self.name} was loaded; on CPUs XLA can't write it again: keep the bytes")
            executable = _compiled_without_cache(self._lowered, self._options)
        return pickle.dumps(
            (
                serialize_executable.serialize(executable),
                self.name,
                self._arguments,
                self.donated,
                (self.lower_seconds, self.compile_seconds),
            )
        )

    @classmethod
    def deserialize(cls, data: bytes, mesh: Mesh) -> "CompiledStep[..., Any]":
        """The step that ``data`` holds, without compiling. Native code and a pickle: load only what you trust.

        Args:
            data: from :meth:`serialize`.
            mesh: the mesh that it was compiled for.
        """
        (code, in_tree, out_tree), name, arguments, donated, seconds = pickle.loads(data)
        step: CompiledStep[..., Any] = cls.__new__(cls)
        step.name, step.mesh, step.donated, step._arguments = name, mesh, donated, arguments
        step.lower_seconds, step.compile_seconds = seconds
        step._lowered, step._may_be_cached = None, True
        step.executable = serialize_executable.deserialize_and_load(
            code, in_tree, out_tree, execution_devices=list(mesh.devices.flat)
        )
        return step


def _compiled_without_cache(lowered: jax.stages.Lowered, options: dict[str, str]) -> jax.stages.Compiled:
    config: Any = jax.config
    before = config.jax_enable_compilation_cache
    config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
    try:
        # An option, at its default, because without one the executable would be the one in hand.
        return lowered.compile(compiler_options={**options, "xla_embed_ir_in_executable": False})
    finally:
        config.update("jax_enable_compilation_cache", before)
        compilation_cache.reset_cache()


def _same_structure(a: Any, b: Any) -> bool:
    left: Any = jax.tree.structure(a)
    return bool(left == jax.tree.structure(b))


def _elsewhere(array: jax.Array, sharding: Sharding) -> bool:
    return not array.sharding.is_equivalent_to(sharding, array.ndim)


def _typed(array: Any) -> str:
    return f"{np.result_type(array)}{list(np.shape(array))}"


def _placed(sharding: Sharding) -> str:
    spec = getattr(sharding, "spec", None)
    return str(spec) if spec is not None else str(sharding)
