"""One function, lowered and compiled once for one mesh."""

from collections.abc import Callable, Sequence
from typing import Any, Generic, ParamSpec, TypeVar

import jax
from jax.sharding import Mesh

P = ParamSpec("P")
R = TypeVar("R")


class CompiledStep(Generic[P, R]):
    """``function`` compiled ahead of time for the shapes and shardings of ``abstract``; it can never compile again.

    Calling it with another shape, dtype or sharding is an error of JAX's that names the argument, not a silent
    recompilation.

    Args:
        function: the function; its arguments are positional pytrees of arrays.
        abstract: one pytree of ``jax.ShapeDtypeStruct`` (with shardings) or arrays per argument.
        mesh: the mesh that annotations inside ``function`` refer to.
        donate: indices of arguments whose buffers the outputs may reuse.
        out_shardings: shardings of the outputs; None lets the partitioner choose.
    """

    def __init__(
        self,
        function: Callable[P, R],
        abstract: Sequence[Any],
        mesh: Mesh,
        donate: Sequence[int] = (),
        out_shardings: Any = None,
    ) -> None:
        with jax.set_mesh(mesh):
            jitted = jax.jit(function, donate_argnums=tuple(donate), out_shardings=out_shardings)
            self.executable = jitted.lower(*abstract).compile()

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        result: R = self.executable(*args, **kwargs)
        return result

    @property
    def hlo(self) -> str:
        """The optimised HLO, as XLA prints it."""
        return str(self.executable.as_text())

    @property
    def hlo_instructions(self) -> int:
        """How many instructions the optimised HLO has; constants do nothing and are not counted."""
        return sum(" = " in line and " constant(" not in line for line in self.hlo.splitlines())
