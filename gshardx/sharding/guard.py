"""Counting compilations, and forbidding them where none may happen: in a loop that was compiled before it started."""

import dataclasses
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax
from jax import monitoring

_LOWERED = "/jax/core/compile/jaxpr_to_mlir_module_duration"
_COMPILED = "/jax/core/compile/backend_compile_duration"


class CompileForbidden(RuntimeError):
    """Something was about to be compiled inside :func:`forbid_compile`."""


@dataclasses.dataclass
class CompileCount:
    """compiled: names of the functions that XLA compiled, or the persistent cache served, in order."""

    compiled: list[str] = dataclasses.field(default_factory=list)


@contextmanager
def count_compiles() -> Iterator[CompileCount]:
    """Count what this process compiles inside the block."""
    count = CompileCount()

    def listen(event: str, seconds: float, **facts: Any) -> None:
        if event == _COMPILED:
            count.compiled.append(str(facts.get("fun_name", "?")))

    with _listening(listen):
        yield count


@contextmanager
def forbid_compile() -> Iterator[None]:
    """Inside the block every function must have been compiled before.

    Raises:
        CompileForbidden: otherwise, before XLA starts; it names the function, and the argument whose shape or type
            changed. Which argument of a plain ``jax.jit`` lies elsewhere JAX does not tell; a :class:`CompiledStep`
            never compiles, and names the argument for either.
    """
    reasons = _Reasons()

    def listen(event: str, seconds: float, **facts: Any) -> None:
        if event == _LOWERED:
            why = reasons.newest or "its arguments lie elsewhere, or it was never called before"
            raise CompileForbidden(f"{facts.get('fun_name', 'a function')} would be compiled here: {why}")

    with _listening(listen), reasons.kept():
        yield


@contextmanager
def _listening(listen: Any) -> Iterator[None]:
    monitoring.register_event_duration_secs_listener(listen)
    try:
        yield
    finally:
        monitoring.unregister_event_duration_listener(listen)


class _Reasons(logging.Handler):
    """JAX's own explanation of the last miss of its tracing cache, which it writes to its log."""

    newest = ""

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if "CACHE MISS" in message:
            self.newest = " ".join(message.split())

    @contextmanager
    def kept(self) -> Iterator[None]:
        logger = logging.getLogger("jax")
        config: Any = jax.config
        before, propagate = config.jax_explain_cache_misses, logger.propagate
        logger.addHandler(self)
        jax.config.update("jax_explain_cache_misses", True)
        logger.propagate = False
        try:
            yield
        finally:
            logger.propagate = propagate
            jax.config.update("jax_explain_cache_misses", before)
            logger.removeHandler(self)
