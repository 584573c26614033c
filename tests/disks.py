"""A disk that is easily full."""

import contextlib
import subprocess

import pytest


@contextlib.contextmanager
def small_disk(place, size):
    """A tmpfs of ``size`` (as mount says it) at ``place``."""
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(place)], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a tmpfs needs root")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", "-R", str(place)], capture_output=True)  # a test may have done it
