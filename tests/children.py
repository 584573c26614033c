"""The environment of the commands that tests start."""

import os
import subprocess
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).parent.parent
PIPES = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}

# LLVM at its lowest level, and jaxlib 0.10's older, plainer code for fusions (0.12 has no such choice): a tiny model
# takes a fraction of the time to compile, and runs as fast as it needs to. What XLA partitions stays the same.
QUICK_TO_COMPILE = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true" + (
    " --xla_cpu_use_fusion_emitters=false" if version("jaxlib").startswith("0.10.") else ""
)


def environment():
    """Ours, without the tests' own device count: each command settles how many it simulates. Scripts find ``tests``."""
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return os.environ | {"XLA_FLAGS": QUICK_TO_COMPILE, "PYTHONPATH": paths}


def users_environment():
    """Ours, with XLA as users have it: for what a test trains long enough to wait for."""
    return {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
