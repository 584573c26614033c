"""What a chip can do: a table of public figures with their sources, and measured figures for CPUs.

Every figure counts for one JAX device, in base units (FLOP/s, bytes, bytes/s, seconds), except where a field says
otherwise. Vendors count ICI and NVLink in both directions together; here a link counts one direction.
"""

import dataclasses
import os
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

_GIB = 2**30
# "typically around 1us" an ICI hop: jax-ml.github.io/scaling-book/sharding. Assumed for NVLink and NICs too.
_HOP_SECONDS = 1e-6


@dataclasses.dataclass(frozen=True)
class Chip:
    """Peak rates of one JAX device and of the links between devices."""

    name: str
    """The family in a topology's name, such as v5p or h100."""
    peak_flops: float
    """Dense bf16 FLOP/s (fp32 on CPUs)."""
    hbm_bytes: float
    """Memory that one program may fill."""
    hbm_bandwidth: float
    """Bytes/s between memory and the cores."""
    ici_bandwidth: float
    """Bytes/s that one link carries in one direction. TPU: an ICI link of a chip. GPU: all NVLink ports together."""
    dcn_bandwidth: float
    """Bytes/s of one device in one direction to another slice (TPU) or host (GPU)."""
    sources: Mapping[str, str] = dataclasses.field(hash=False, repr=False)
    """Where each figure above is from, under its field's name."""
    torus_dimensions: int = 0
    """Dimensions of the ICI torus; 0 where a switch joins every device with every other."""
    ring: int = 0
    """A dimension of the torus wraps around where the slice's extent along it is a multiple of this."""
    devices_per_chip: int = 1
    """JAX devices that share one chip's ICI links."""
    hop_seconds: float = _HOP_SECONDS
    """Time of a message's first byte from one device to the next."""
    device_kinds: tuple[str, ...] = ()
    """What `jax.Device.device_kind` says of this chip."""
    largest: tuple[int, ...] = ()
    """Extents of the largest slice on sale; (devices of the largest host,) for GPUs."""

    @property
    def ici_links(self) -> int:
        """ICI links of a chip: two for each dimension of its torus, one into a switch."""
        return 2 * self.torus_dimensions or 1


FIGURES = ("peak_flops", "hbm_bytes", "hbm_bandwidth", "ici_bandwidth", "dcn_bandwidth")
_TPU_DOCS = "https://docs.cloud.google.com/tpu/docs"
_BOOK = "https://jax-ml.github.io/scaling-book/tpus"


def _tpu(
    name: str,
    kinds: tuple[str, ...],
    largest: tuple[int, ...],
    *,
    tflops: float,
    gib: float,
    vendor_gib: int,
    hbm_gbps: float,
    ici_total_gbps: float,
    ici_note: str,
    dcn_gbits: float,
    dcn_note: str = "",
    devices: int = 1,
) -> Chip:
    """A TPU from its chip's data sheet.

    tflops, vendor_gib, hbm_gbps (GB/s), ici_total_gbps (GB/s of all links, both directions) and dcn_gbits (Gbit/s)
    count for a chip; gib, what libtpu lets a program of one device use, counts for a device.
    """
    dimensions = len(largest)
    page = f"{_TPU_DOCS}/{name}"
    share = f" / {devices} devices a chip" if devices > 1 else ""
    return Chip(
        name=name,
        peak_flops=tflops * 1e12 / devices,
        hbm_bytes=gib * _GIB,
        hbm_bandwidth=hbm_gbps * 1e9 / devices,
        ici_bandwidth=ici_total_gbps * 1e9 / (2 * dimensions) / 2,
        dcn_bandwidth=dcn_gbits * 1e9 / 8 / devices,
        torus_dimensions=dimensions,
        ring=16 if dimensions == 2 else 4,
        devices_per_chip=devices,
        device_kinds=kinds,
        largest=largest,
        sources=MappingProxyType(
            {
                "peak_flops": f"{tflops:g} TFLOP/s bf16 a chip{share}, {page}",
                "hbm_bytes": f"least limit in the out-of-memory messages of libtpu 0.0.42 and 0.0.50; "
                f"{vendor_gib} GiB a chip, {page}",
                "hbm_bandwidth": f"{hbm_gbps:g} GB/s a chip{share}, {page}",
                "ici_bandwidth": f"{ici_total_gbps:g} GB/s a chip over {2 * dimensions} links and 2 directions, "
                f"{page}; {ici_note}",
                "dcn_bandwidth": f"{dcn_gbits:g} Gbit/s a chip{share}, {dcn_note or page}",
            }
        ),
    )


# XLA_PYTHON_CLIENT_MEM_FRACTION, docs.jax.dev/en/latest/gpu_memory_allocation.html.
_XLAS_SHARE = 0.75


def _gpu(
    name: str,
    kinds: tuple[str, ...],
    *,
    tflops: float,
    memory: int,
    hbm_gbps: float,
    nvlink_total_gbps: float,
    nic_gbits: float,
    page: str,
    nic_page: str,
    unverified: str = "",
) -> Chip:
    """An NVIDIA GPU from its data sheet: nvlink_total_gbps is GB/s of both directions, nic_gbits Gbit/s a GPU."""
    return Chip(
        name=name,
        peak_flops=tflops * 1e12,
        hbm_bytes=_XLAS_SHARE * memory,
        hbm_bandwidth=hbm_gbps * 1e9,
        ici_bandwidth=nvlink_total_gbps * 1e9 / 2,
        dcn_bandwidth=nic_gbits * 1e9 / 8,
        device_kinds=kinds,
        largest=(8,),
        sources=MappingProxyType(
            {
                "peak_flops": f"{tflops:g} TFLOP/s bf16 without sparsity, {page}{unverified}",
                "hbm_bytes": f"{_XLAS_SHARE:.0%} of {memory / _GIB:.2f} GiB that the driver reports (openxla/xla "
                "xla/backends/gpu/target_config/specs), which is what XLA claims by default",
                "hbm_bandwidth": f"{hbm_gbps:g} GB/s, {page}{unverified}",
                "ici_bandwidth": f"NVLink {nvlink_total_gbps:g} GB/s in both directions together, {page}{unverified}; "
                "halves agree with https://jax-ml.github.io/scaling-book/gpus",
                "dcn_bandwidth": f"one {nic_gbits:g} Gbit/s NIC a GPU, {nic_page}",
            }
        ),
    )


_A100 = "https://www.nvidia.com/en-us/data-center/a100"
_A100_NIC = "DGX A100 data sheet (8 x ConnectX-6 HDR); recalled, not looked up"
_TENTH_LESS = f"{_BOOK} counts 10 % less"
_COMPARED = f"comparison table of {_TPU_DOCS}/tpu7x"

CHIPS: Mapping[str, Chip] = MappingProxyType(
    {
        chip.name: chip
        for chip in (
            _tpu(
                "v4",
                ("TPU v4",),
                (16, 16, 16),
                tflops=275,
                gib=30.75,
                vendor_gib=32,
                hbm_gbps=1200,
                ici_total_gbps=540,
                ici_note=f"derived from its all-reduce rate, 1.1 PB/s a pod of 4,096; {_BOOK} agrees",
                dcn_gbits=50,
                dcn_note=f"{_BOOK} (6.25e9 bytes/s)",
            ),
            _tpu(
                "v5e",
                ("TPU v5 lite", "TPU v5e"),
                (16, 16),
                tflops=197,
                gib=15.75,
                vendor_gib=16,
                hbm_gbps=819,
                ici_total_gbps=400,
                ici_note=_TENTH_LESS,
                dcn_gbits=25,
                dcn_note=f"2 x 100 Gbit/s for a host of 8, {_TPU_DOCS}/v5e, and {_BOOK}",
            ),
            _tpu(
                "v5p",
                ("TPU v5", "TPU v5p"),
                (16, 20, 28),
                tflops=459,
                gib=95.73,
                vendor_gib=95,
                hbm_gbps=2765,
                ici_total_gbps=1200,
                ici_note=_TENTH_LESS,
                dcn_gbits=50,
            ),
            _tpu(
                "v6e",
                ("TPU v6 lite", "TPU v6e"),
                (16, 16),
                tflops=918,
                gib=31.24,
                vendor_gib=32,
                hbm_gbps=1638,
                ici_total_gbps=800,
                ici_note=_TENTH_LESS,
                dcn_gbits=100,
                dcn_note=f"{_COMPARED}, and {_BOOK}",
            ),
            _tpu(
                "tpu7x",
                ("TPU7x", "TPU v7x"),
                (16, 24, 24),
                tflops=2307,
                gib=94.74,
                vendor_gib=192,
                hbm_gbps=7380,
                ici_total_gbps=1200,
                ici_note="no second source",
                dcn_gbits=100,
                devices=2,
            ),
            _gpu(
                "a100",
                ("NVIDIA A100-SXM4-80GB",),
                tflops=312,
                memory=85_100_068_864,
                hbm_gbps=2039,
                nvlink_total_gbps=600,
                nic_gbits=200,
                page=_A100,
                nic_page=_A100_NIC,
            ),
            _gpu(
                "a100-40",
                ("NVIDIA A100-SXM4-40GB",),
                tflops=312,
                memory=42_331_013_120,
                hbm_gbps=1555,
                nvlink_total_gbps=600,
                nic_gbits=200,
                page=_A100,
                nic_page=_A100_NIC,
            ),
            _gpu(
                "h100",
                ("NVIDIA H100 80GB HBM3",),
                tflops=989.4,
                memory=84_942_979_072,
                hbm_gbps=3350,
                nvlink_total_gbps=900,
                nic_gbits=400,
                page="https://www.nvidia.com/en-us/data-center/h100",
                nic_page="DGX H100 (8 x 400 Gbit/s), https://jax-ml.github.io/scaling-book/gpus",
            ),
            _gpu(
                "h200",
                ("NVIDIA H200",),
                tflops=989.4,
                memory=151_397_597_184,
                hbm_gbps=4800,
                nvlink_total_gbps=900,
                nic_gbits=400,
                page="https://www.nvidia.com/en-us/data-center/h200",
                nic_page="DGX H200 (8 x 400 Gbit/s ConnectX-7); recalled, not looked up",
            ),
            _gpu(
                "b200",
                ("NVIDIA B200",),
                tflops=2250,
                memory=191_514_411_008,
                hbm_gbps=8000,
                nvlink_total_gbps=1800,
                nic_gbits=400,
                page="https://www.nvidia.com/en-us/data-center/dgx-b200",
                nic_page="8 x 400 Gbit/s ConnectX-7, https://docs.nvidia.com/dgx/dgxb200-user-guide",
                unverified=" (HGX board at 1,000 W; vendor's page not looked up, secondary pages agree)",
            ),
        )
    }
)


def chip_of(device: Any) -> Chip | None:
    """The table's row for a JAX device, found by its `device_kind`; None for a kind that the table lacks."""
    return next((chip for chip in CHIPS.values() if device.device_kind in chip.device_kinds), None)


def measure_cpu(devices: Sequence[Any]) -> Chip:
    """Time this machine as ``devices`` (CPU devices, JAX initialised) share it; takes about a second.

    Compute and memory are timed with the whole machine at work and divided by the number of devices. The exchange is
    an all-to-all of all devices, so its rate is each device's own already. With one device there is nothing to
    exchange: the memory's rate stands in.
    """
    count = len(devices)
    copy = _copy_rate() / count
    exchange, hop = _exchange(devices) if count > 1 else (copy, 0.0)
    shared = f"shared by {count} device(s)" if count > 1 else "one device"
    return Chip(
        name="cpu",
        peak_flops=matmul_rate(devices[0]) / count,
        hbm_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / count,
        hbm_bandwidth=copy,
        ici_bandwidth=exchange,
        dcn_bandwidth=exchange,
        hop_seconds=hop,
        device_kinds=("cpu",),
        sources=MappingProxyType(
            {
                "peak_flops": f"fp32 matrix product timed here, {shared}",
                "hbm_bytes": f"memory of this machine, {shared}",
                "hbm_bandwidth": f"copy timed here (bytes read and written), {shared}",
                "ici_bandwidth": "all-to-all timed here" if count > 1 else "the memory's: nothing to exchange",
                "dcn_bandwidth": "not measured: as between devices of one process",
            }
        ),
    )


def _best_seconds(run: Any, repeats: int = 3) -> float:
    best = float("inf")
    run()
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - start)
    return best


def matmul_rate(device: Any, size: int = 1024) -> float:
    """FLOP/s of a square fp32 product; XLA's CPU compiler spreads one over all cores."""
    a = jax.device_put(jnp.ones((size, size), jnp.float32), device)
    product = jax.jit(jnp.dot).lower(a, a).compile()
    return 2 * size**3 / _best_seconds(lambda: jax.block_until_ready(product(a, a)))


def _copy_rate(size: int = 2**27) -> float:
    """Bytes/s read plus written by all cores' copy of ``size`` bytes, more than a cache holds."""
    cores = os.cpu_count() or 1
    source = np.ones((cores, size // cores), np.uint8)
    target = np.empty_like(source)
    with ThreadPoolExecutor(cores) as threads:
        return 2 * source.size / _best_seconds(lambda: list(threads.map(np.copyto, target, source)))


def _exchange(devices: Sequence[Any], piece: int = 2**16) -> tuple[float, float]:
    """Bytes/s that a device sends in an all-to-all of large pieces (``piece`` fp32 a pair), and the seconds of one
    of tiny pieces."""
    count = len(devices)
    mesh = Mesh(np.array(devices), ("all",), axis_types=(AxisType.Auto,))
    places = NamedSharding(mesh, PartitionSpec("all", None)), NamedSharding(mesh, PartitionSpec(None, "all"))

    def seconds(width: int) -> float:
        x = jax.device_put(jnp.zeros((count, count * width), jnp.float32), places[0])
        swap = jax.jit(lambda x: x + 1, out_shardings=places[1]).lower(x).compile()
        return _best_seconds(lambda: jax.block_until_ready(swap(x)))

    hop = seconds(1)
    sent = 4 * piece * (count - 1)
    return sent / max(seconds(piece) - hop, 1e-9), hop
