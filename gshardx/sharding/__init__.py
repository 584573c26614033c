"""Where tensors live. Knows nothing of models."""

from gshardx.sharding.annotate import axis_size, manual, replicate, reshard, shard, split
from gshardx.sharding.axes import (
    RULES,
    Rules,
    abstract_array,
    bytes_per_device,
    partition_spec,
    variable_axes,
    variable_spec,
)
from gshardx.sharding.collectives import Allowance, Budget, Collective, collectives, totals
from gshardx.sharding.compile import ArgumentChanged, ArgumentUsedUp, CompiledStep, Memory
from gshardx.sharding.describe import Description, Row, describe
from gshardx.sharding.guard import CompileForbidden, count_compiles, forbid_compile
from gshardx.sharding.mesh import MeshConfig, backend, build_mesh, one_program_at_a_time, simulate_devices

__all__ = [
    "RULES",
    "Allowance",
    "ArgumentChanged",
    "ArgumentUsedUp",
    "Budget",
    "Collective",
    "CompileForbidden",
    "CompiledStep",
    "Description",
    "Memory",
    "MeshConfig",
    "Row",
    "Rules",
    "abstract_array",
    "axis_size",
    "backend",
    "build_mesh",
    "bytes_per_device",
    "collectives",
    "count_compiles",
    "describe",
    "forbid_compile",
    "manual",
    "one_program_at_a_time",
    "partition_spec",
    "replicate",
    "reshard",
    "shard",
    "simulate_devices",
    "split",
    "totals",
    "variable_axes",
    "variable_spec",
]
