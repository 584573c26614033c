"""What a command settles before JAX starts. A library leaves these choices to the program that imports it."""

import glob
import hashlib
import importlib.util
import os
import platform
from pathlib import Path
from typing import Any

import jax

_SETTINGS: Any = jax.config  # its attributes are not typed
_ACCELERATORS = ("/dev/accel*", "/dev/vfio/[0-9]*", "/dev/nvidia*", "/dev/dxg", "/dev/kfd")


def without_an_absent_tpu() -> None:
    """Stay on the CPU where no accelerator is attached: with libtpu installed JAX looks for a TPU and prints pages."""
    looks_for_one = _SETTINGS.jax_platforms is None and importlib.util.find_spec("libtpu") is not None
    if looks_for_one and not any(map(glob.glob, _ACCELERATORS)):
        jax.config.update("jax_platforms", "cpu")


def keep_compiled() -> None:
    """Keep compiled programs from run to run, in ``$XDG_CACHE_HOME/gshardx/xla`` (``~/.cache``).

    JAX's own settings come first: ``JAX_COMPILATION_CACHE_DIR`` names another place and
    ``JAX_ENABLE_COMPILATION_CACHE=false`` turns it off. A folder for each kind of machine, because XLA's code for a CPU
    uses the instructions that this CPU has, and homes are shared.
    """
    if _SETTINGS.jax_compilation_cache_dir is None:
        root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        jax.config.update("jax_compilation_cache_dir", str(root / "gshardx" / "xla" / _machine()))


def _machine() -> str:
    try:
        facts = Path("/proc/cpuinfo").read_text()
    except OSError:
        facts = platform.processor()
    flags = next((line for line in facts.splitlines() if line.startswith(("flags", "Features"))), facts)
    return f"{platform.machine()}-{hashlib.sha256(flags.encode()).hexdigest()[:12]}"
