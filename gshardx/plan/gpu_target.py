"""What XLA's GPU compiler asks about a GPU that is not there, as the text of a GpuTargetConfigProto."""

import dataclasses

from gshardx.sharding.chips import Chip


@dataclasses.dataclass(frozen=True)
class _Silicon:
    """Figures of a chip, from NVIDIA's CUDA programming guide (compute capabilities) and architecture papers; they
    agree with what the devices report (openxla/xla, xla/backends/gpu/target_config/specs)."""

    major: int
    cores: int
    fpus_per_core: int
    shared_memory_per_core: int
    shared_memory_per_block: int
    l2_bytes: int
    clock_ghz: float
    extension: str
    """ACCELERATED_FEATURES for the instructions that only the compute capability with an "a" has (wgmma, tcgen05)."""


_AMPERE = _Silicon(8, 108, 64, 164 * 1024, 163 * 1024, 40 * 2**20, 1.41, "NONE")
_HOPPER = _Silicon(9, 132, 128, 228 * 1024, 227 * 1024, 50 * 2**20, 1.98, "ACCELERATED_FEATURES")
_BLACKWELL = _Silicon(10, 148, 128, 228 * 1024, 227 * 1024, 132_644_864, 1.965, "ACCELERATED_FEATURES")
_SILICON = {"a100": _AMPERE, "a100-40": _AMPERE, "h100": _HOPPER, "h200": _HOPPER, "b200": _BLACKWELL}


def target_config(chip: Chip) -> str:
    """The target of an NVIDIA chip of the table, for `get_topology_desc(platform="cuda", target_config=...)`.

    Limits that all these chips share stand in the text; CUDA 12.8 and cuDNN 9.10 are what the code is compiled for.
    """
    silicon = _SILICON[chip.name]
    return f"""
gpu_device_info {{
  cuda_compute_capability {{ major: {silicon.major} feature_extension: {silicon.extension} }}
  core_count: {silicon.cores}
  fpus_per_core: {silicon.fpus_per_core}
  clock_rate_ghz: {silicon.clock_ghz}
  device_memory_size: {chip.hbm_bytes:.0f}
  memory_bandwidth: {chip.hbm_bandwidth:.0f}
  l2_cache_size: {silicon.l2_bytes}
  shared_memory_per_core: {silicon.shared_memory_per_core}
  shared_memory_per_block: {48 * 1024}
  shared_memory_per_block_optin: {silicon.shared_memory_per_block}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  threads_per_core_limit: 2048
  threads_per_block_limit: 1024
  threads_per_warp: 32
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
}}
platform_name: "CUDA"
runtime_version {{ major: 12 minor: 8 }}
dnn_version_info {{ major: 9 minor: 10 }}
device_description_str: "{chip.device_kinds[0]}"
"""
