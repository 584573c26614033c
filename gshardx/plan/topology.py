"""Devices to compile for: those that are here, simulated ones, or chips that nobody here owns."""

import dataclasses
import difflib
import importlib.util
import math
import os
import re
from collections.abc import Sequence
from typing import Any

import jax
from jax.experimental import topologies

from gshardx.errors import BadInput
from gshardx.plan.gpu_target import target_config
from gshardx.sharding import simulate_devices
from gshardx.sharding.chips import CHIPS, Chip, chip_of, measure_cpu

# Chips of one host, which the shape of a slice is made of: libtpu's default for all generations.
_HOST = (2, 2, 1)
_EXAMPLES = "cpu:8, local, v5e:4x4, v5p:2x2x2 or h100:2x8"


@dataclasses.dataclass(frozen=True)
class Topology:
    """Devices and what joins them."""

    name: str
    """As given: v5p:8x16x16, cpu:8, local, h100:4x8."""
    devices: tuple[Any, ...]
    """JAX devices, real, simulated or compile-only, in JAX's order."""
    chip: Chip
    torus: tuple[int, ...]
    """Chips along each dimension of the ICI torus of one slice; () for none (CPUs, GPUs)."""
    slices: int
    """TPU slices, or GPU hosts, joined by the data-centre network."""


def prepare(name: str) -> None:
    """Set what JAX and libtpu read when they start: call before JAX first touches a device.

    Chips that are not here, and simulated ones, are used from the CPU backend; accelerators that are here stay free.

    Raises:
        BadInput: ``name`` is no topology.
    """
    family, extents = _parse(name)
    if family == "local":
        return
    jax.config.update("jax_platforms", "cpu")
    if family == "cpu":
        simulate_devices(extents[0])
    elif CHIPS[family].torus_dimensions:
        os.environ["TPU_SKIP_MDS_QUERY"] = "1"  # no metadata server to ask outside Google's cloud
        os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"  # or a second process stops at libtpu's lock file
        # Without these two libtpu looks for the machine it runs on and logs on stderr that it isn't one of Google's;
        # the topology's own name decides what is compiled for.
        os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
        os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
        # Where memory does not suffice, libtpu then compiles all the same and says how much it would take.
        os.environ["LIBTPU_INIT_ARGS"] = f"{os.environ.get('LIBTPU_INIT_ARGS', '')} --xla_tpu_no_crash_on_oom=true"
    else:
        os.environ["CUDA_VISIBLE_DEVICES"] = "-1"
        os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"  # or the plug-in wants a driver and cuDNN


def open_topology(name: str, slices: int = 1) -> Topology:
    """The devices of a topology, after :func:`prepare` has been called with the same name.

    Args:
        name: `cpu:N` simulated devices; `local`, what is here; a TPU slice by its chips (`v4|v5p|tpu7x:AxBxC`,
            `v5e|v6e:AxB`); NVIDIA GPUs by hosts and GPUs of each (`a100|a100-40|h100|h200|b200:HxG`, or `:G`).
        slices: how many such TPU slices.

    Raises:
        BadInput: unknown or malformed name, a shape that doesn't exist, libtpu or the CUDA plug-in missing, fewer
            CPU devices than named, or slices of something that has none.
    """
    family, extents = _parse(name)
    if slices < 1:
        raise BadInput(f"slices = {slices}: use 1 or more")
    if slices > 1 and (family not in CHIPS or not CHIPS[family].torus_dimensions):
        mend = "write the hosts into the name, for example h100:2x8" if family in CHIPS else "leave slices at 1"
        raise BadInput(f"topology {name} has no TPU slices; {mend}")
    if family == "local":
        return _local()
    if family == "cpu":
        return _simulated(name, extents[0])
    chip = CHIPS[family]
    if not chip.torus_dimensions:
        return Topology(name, _cuda_devices(name, chip, extents), chip, (), extents[0])
    return Topology(name, _tpu_devices(name, chip, extents, slices), chip, extents, slices)


def _parse(name: str) -> tuple[str, tuple[int, ...]]:
    """Family and extents: (N,) of `cpu:N`, () of `local`, the torus of a TPU slice, (hosts, GPUs of each)."""
    family, colon, shape = name.partition(":")
    families = ("cpu", "local", *CHIPS)
    if family not in families:
        nearest = difflib.get_close_matches(family.lower(), families, n=1, cutoff=0.0)[0]
        meant = nearest + (colon + shape if nearest != "local" else "")
        raise BadInput(f"topology {name}: no family {family!r}; did you mean {meant}? There are {', '.join(families)}")
    if family == "local":
        if colon:
            raise BadInput(f"topology {name}: local takes no shape; use local")
        return family, ()
    if not re.fullmatch(r"[0-9]{1,6}(x[0-9]{1,6})*", shape):
        raise BadInput(f"topology {name}: {shape!r} is no shape; write it like {_EXAMPLES}")
    extents = tuple(int(extent) for extent in shape.split("x"))
    if min(extents) < 1:
        raise BadInput(f"topology {name}: every extent is at least 1; write it like {_EXAMPLES}")
    if family == "cpu":
        if len(extents) > 1:
            raise BadInput(f"topology {name}: cpu takes one number; use cpu:{math.prod(extents)}")
        return family, extents
    chip = CHIPS[family]
    return family, _torus(name, chip, extents) if chip.torus_dimensions else _hosts(name, chip, extents)


def _torus(name: str, chip: Chip, extents: tuple[int, ...]) -> tuple[int, ...]:
    """The extents with as many dimensions as the chip's torus; a missing last one is 1."""
    dimensions = chip.torus_dimensions
    padded = extents + (1,) * (dimensions - len(extents))
    if len(extents) < 2 or any(extent > 1 for extent in padded[dimensions:]):
        shape = "AxB" if dimensions == 2 else "AxBxC"
        raise BadInput(f"topology {name}: {chip.name} is a {dimensions}-dimensional torus; write {chip.name}:{shape}")
    torus = padded[:dimensions]
    most = "x".join(map(str, chip.largest))
    too_long = dimensions == 2 and any(extent > most for extent, most in zip(torus, chip.largest, strict=True))
    if too_long or math.prod(torus) > math.prod(chip.largest):
        raise BadInput(
            f"topology {name}: the largest {chip.name} slice is {most}, {math.prod(chip.largest)} chips; "
            "take several slices of it"
        )
    if not _in_one_host(torus) and any(extent % step for extent, step in zip(torus, _HOST, strict=False)):
        raise BadInput(
            f"topology {name}: beyond one host the first two extents are even (hosts are 2x2 chips); "
            f"{_nearby(chip, torus)} would work"
        )
    return torus


def _in_one_host(torus: Sequence[int]) -> bool:
    return all(extent <= most for extent, most in zip(torus, _HOST, strict=False))


def _nearby(chip: Chip, torus: tuple[int, ...]) -> str:
    """The next smaller and the next larger shape that hosts of 2x2 chips can form."""
    smaller, larger = (
        tuple(max(step, (extent + up * (step - 1)) // step * step) for extent, step in zip(torus, _HOST, strict=False))
        for up in (0, 1)
    )
    return " or ".join(f"{chip.name}:{'x'.join(map(str, shape))}" for shape in dict.fromkeys((smaller, larger)))


def _hosts(name: str, chip: Chip, extents: tuple[int, ...]) -> tuple[int, int]:
    if len(extents) > 2:
        raise BadInput(f"topology {name}: GPUs are hosts x GPUs of each; write {chip.name}:2x8 or {chip.name}:8")
    hosts, gpus = (1, *extents)[-2:]
    most = chip.largest[0]
    if gpus > most:
        mend = f"{chip.name}:{hosts * math.ceil(gpus / most)}x{most}"
        raise BadInput(f"topology {name}: a host has at most {most} {chip.name} GPUs; write {mend}")
    return hosts, gpus


def _simulated(name: str, count: int) -> Topology:
    devices = tuple(jax.devices("cpu"))
    if len(devices) < count:
        raise BadInput(
            f"topology {name}: {len(devices)} CPU device(s) are here, since JAX had started or XLA_FLAGS says so; "
            f"unset XLA_FLAGS, or set it to --xla_force_host_platform_device_count={count}"
        )
    return Topology(name, devices[:count], measure_cpu(devices[:count]), (), 1)


def _local() -> Topology:
    devices = tuple(jax.devices())
    if devices[0].platform == "cpu":
        return Topology("local", devices, measure_cpu(devices), (), 1)
    chip = chip_of(devices[0])
    if chip is None:
        known = ", ".join(kind for chip in CHIPS.values() for kind in chip.device_kinds)
        raise BadInput(f"topology local: no figures for {devices[0].device_kind!r} devices; there are some for {known}")
    slices = {getattr(device, "slice_index", None) or 0 for device in devices}
    return Topology("local", devices, chip, _spanned(devices, chip.torus_dimensions), len(slices))


def _spanned(devices: Sequence[Any], dimensions: int) -> tuple[int, ...]:
    """Chips along each dimension of the box that the devices' coordinates span."""
    coordinates = [device.coords[:dimensions] for device in devices] if dimensions else []
    return tuple(max(along) - min(along) + 1 for along in zip(*coordinates, strict=True))


def _tpu_devices(name: str, chip: Chip, torus: tuple[int, ...], slices: int) -> tuple[Any, ...]:
    if importlib.util.find_spec("libtpu") is None and "TPU_LIBRARY_PATH" not in os.environ:
        raise BadInput(f"topology {name}: libtpu is missing; pip install 'gshardx[tpu]' (or: pip install libtpu)")
    # JAX sees a v4 chip as one device only with its two cores joined; later chips are built that way.
    joined = {"chip_config_name": "megacore"} if chip.name == "v4" else {}
    try:
        description = topologies.get_topology_desc(
            platform="tpu",
            topology_name=f"{chip.name}:{'x'.join(map(str, torus))}",
            chips_per_host_bounds=(*torus, 1)[:3] if _in_one_host(torus) else _HOST,
            num_slices=slices,
            **joined,
        )
    except jax.errors.JaxRuntimeError as error:
        raise BadInput(f"topology {name}: libtpu refuses it ({' '.join(str(error).split())})") from error
    return tuple(description.devices)


def _cuda_devices(name: str, chip: Chip, hosts: tuple[int, ...]) -> tuple[Any, ...]:
    try:
        description = topologies.get_topology_desc(
            platform="cuda", target_config=target_config(chip), topology=f"1x{hosts[0]}x{hosts[1]}"
        )
    except NotImplementedError as error:
        version = jax.__version__
        raise BadInput(
            f"topology {name}: JAX's CUDA plug-in is missing or didn't start; pip install "
            f"jax-cuda12-plugin=={version} jax-cuda12-pjrt=={version} nvidia-cuda-nvcc-cu12"
        ) from error
    except jax.errors.JaxRuntimeError as error:
        raise BadInput(f"topology {name}: the CUDA plug-in refuses it ({' '.join(str(error).split())})") from error
    return tuple(description.devices)
