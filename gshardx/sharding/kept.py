"""Compiled steps on disk: a second start reads them back, without tracing, lowering or compiling.

JAX's persistent cache spares XLA's part of a start alone. These files spare all of it, and lie beside that cache, where
there is one (:func:`gshardx.sharding.startup.keep_compiled`).
"""

import contextlib
import functools
import hashlib
import os
import tempfile
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import Mesh

from gshardx.sharding.compile import CompiledStep
from gshardx.sharding.startup import machine

_SETTINGS: Any = jax.config


class KeptSteps:
    """Steps that share a mesh and all other facts that shape them.

    Args:
        mesh: what they are compiled for.
        facts: with the steps' names, versions, devices and this package's own code, all that they depend on.
    """

    def __init__(self, mesh: Mesh, facts: str) -> None:
        self.mesh, self.folder = mesh, _folder()
        devices = [(device.device_kind, device.id) for device in mesh.devices.flat]
        xla = os.environ.get("XLA_FLAGS", "")
        told = (facts, mesh.shape, devices, machine(), version("jax"), version("jaxlib"), xla, _own_code())
        self._key = hashlib.sha256(repr(told).encode()).hexdigest()[:24]

    def get(self, name: str, make: Callable[[], CompiledStep[..., Any]]) -> CompiledStep[..., Any]:
        """Read it, or make and keep it; a file that can't be read is made again. Call it inside :meth:`making`."""
        if self.folder is None:
            return make()
        with contextlib.suppress(Exception):  # whatever is wrong with a cached file, the step can be made
            return CompiledStep.deserialize(self._file(name).read_bytes(), self.mesh)
        step = make()
        with contextlib.suppress(OSError):  # a full disk costs the next start some time, and nothing else
            self._write(self._file(name), step.serialize())
        return step

    @contextlib.contextmanager
    def making(self) -> Iterator[None]:
        """Compile without the persistent cache, all threads: what comes from it can't be written again on CPUs."""
        if self.folder is None:
            yield
            return
        _SETTINGS.update("jax_enable_compilation_cache", False)
        compilation_cache.reset_cache()
        try:
            yield
        finally:
            _SETTINGS.update("jax_enable_compilation_cache", True)
            compilation_cache.reset_cache()

    def _file(self, name: str) -> Path:
        assert self.folder is not None
        return self.folder / f"{name}-{self._key}.step"

    def _write(self, file: Path, data: bytes) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=file.parent, delete=False) as part:
            try:
                part.write(data)
                part.close()
                os.replace(part.name, file)
            except OSError:
                os.unlink(part.name)
                raise


def _folder() -> Path | None:
    """None where programs are not kept, or not this process's alone."""
    place = _SETTINGS.jax_compilation_cache_dir
    if place is None or not _SETTINGS.jax_enable_compilation_cache or jax.process_count() > 1:
        return None
    return Path(place) / "steps"


@functools.cache
def _own_code() -> str:
    """Of all of this package: an edited line must not meet an old program."""
    sources = sorted(Path(__file__).parent.parent.rglob("*.py"))
    return hashlib.sha256(b"\0".join(source.read_bytes() for source in sources)).hexdigest()
