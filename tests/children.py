"""The environment of the commands that tests start."""

import os

# LLVM at its lowest level: a tiny model takes half the seconds to compile (tests/layers/test_remat: 26 s to 15), and
# runs as fast as it needs to. What XLA partitions and fuses stays the same.
QUICK_TO_COMPILE = "--xla_backend_optimization_level=0"


def environment():
    """Ours, without the tests' own device count: each command settles how many it simulates."""
    return os.environ | {"XLA_FLAGS": QUICK_TO_COMPILE}


def users_environment():
    """Ours, with XLA as users have it: for what a test trains long enough to wait for."""
    return {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
