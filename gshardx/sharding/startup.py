"""What a command settles before JAX starts. A library leaves these choices to the program that imports it."""

import ctypes
import glob
import hashlib
import importlib.util
import os
import platform
import sys
from pathlib import Path
from typing import Any

import jax

_SETTINGS: Any = jax.config  # its attributes are not typed
_ACCELERATORS = ("/dev/accel*", "/dev/vfio/[0-9]*", "/dev/nvidia*", "/dev/dxg", "/dev/kfd")
_KEEPING = (
    (-8, 1),  # M_ARENA_MAX: threads share the one arena that can grow to any size; others map what is over 64 MB
    (-4, 0),  # M_MMAP_MAX: nothing is mapped by itself, since that is unmapped when freed
    (-1, -1),  # M_TRIM_THRESHOLD: never
)
"""glibc's ``mallopt``, malloc.h."""


def without_an_absent_tpu() -> None:
    """Stay on the CPU where no accelerator is attached: with libtpu installed JAX looks for a TPU and prints pages."""
    looks_for_one = _SETTINGS.jax_platforms is None and importlib.util.find_spec("libtpu") is not None
    if looks_for_one and not _has_accelerator():
        jax.config.update("jax_platforms", "cpu")


def keep_memory() -> None:
    """On a CPU that is one device, keep what is freed for the next step instead of giving it back to Linux.

    XLA frees a step's temporaries at its end. Left alone, glibc unmaps them, and a fifth to a quarter of the next step
    goes into fresh pages; the price is a higher peak (``benchmarks/memory_kept.py``). With several simulated devices
    the gain is gone, and the price higher. What the user has told glibc about its memory stays as it is.
    """
    told = "MALLOC_" in "".join(os.environ) or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", "")
    if sys.platform != "linux" or told or _has_accelerator():
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    if mallopt is not None:
        for option, value in _KEEPING:
            mallopt(option, value)


def keep_compiled() -> None:
    """Keep compiled programs from run to run, in ``$XDG_CACHE_HOME/gshardx/xla`` (``~/.cache``).

    JAX's own settings come first: ``JAX_COMPILATION_CACHE_DIR`` names another place and
    ``JAX_ENABLE_COMPILATION_CACHE=false`` turns it off. A folder for each kind of machine, because XLA's code for a CPU
    uses the instructions that this CPU has, and homes are shared.
    """
    if _SETTINGS.jax_compilation_cache_dir is None:
        root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        jax.config.update("jax_compilation_cache_dir", str(root / "gshardx" / "xla" / machine()))


def _has_accelerator() -> bool:
    return any(map(glob.glob, _ACCELERATORS))


def machine() -> str:
    """Tells CPUs apart that run different code."""
    try:
        facts = Path("/proc/cpuinfo").read_text()
    except OSError:
        facts = platform.processor()
    flags = next((line for line in facts.splitlines() if line.startswith(("flags", "Features"))), facts)
    return f"{platform.machine()}-{hashlib.sha256(flags.encode()).hexdigest()[:12]}"
