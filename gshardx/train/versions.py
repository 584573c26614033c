"""What a start of a run was made with."""

import platform
from importlib import metadata
from typing import Any

import jax
from jax.sharding import Mesh

PACKAGES = ("gshardx", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


def about_start(mesh: Mesh, command: str) -> dict[str, Any]:
    """Versions, devices, processes and the command, for an event."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:  # run from a checkout that is not installed
            versions[name] = "not installed"
    kind = mesh.devices.flat[0].device_kind
    devices = f"{mesh.size} x {kind}"
    return {"versions": versions, "devices": devices, "processes": jax.process_count(), "command": command}
