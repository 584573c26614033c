"""FLOPs and memory traffic of a compiled program, counted from its HLO.

XLA's own ``cost_analysis`` counts a loop's body once, so a scanned stack of 60 layers looks like one.
"""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from gshardx.sharding.hlo import Computation, Instruction, Program

_FREE = {
    *("parameter", "constant", "iota", "tuple", "get-tuple-element", "bitcast", "partition-id", "replica-id"),
    *("while", "conditional", "call", "after-all", "async-start", "async-update", "async-done"),
}
"""Instructions that move nothing of their own."""


class Cost(NamedTuple):
    """Of one instruction: FLOPs of its matrix products, bytes that it reads and writes, and how often it runs."""

    flops: int
    bytes: int
    times: int


def costs(program: Program) -> Iterator[Cost]:
    """What each instruction that a run executes costs one device."""
    for instruction, computation, times in program.executed():
        fused = program.fused(instruction)
        flops = _flops(instruction, computation) if fused is None else sum(_nested(program, fused))
        yield Cost(flops, _traffic(program, instruction, computation), times)


def matmul_flops(program: Program) -> int:
    """FLOPs of the matrix products that one device executes in a run, 2 a multiply-add; nothing else is counted."""
    return sum(cost.times * cost.flops for cost in costs(program))


def _nested(program: Program, computation: Computation) -> Iterator[int]:
    """Products of a fusion, and of fusions inside it."""
    for instruction in computation.values():
        fused = program.fused(instruction)
        if fused is None:
            yield _flops(instruction, computation)
        else:
            yield from _nested(program, fused)


def _flops(instruction: Instruction, computation: Computation) -> int:
    if instruction.op == "dot":
        contracted = _dims(instruction.find(r"lhs_contracting_dims=\{([\d,]*)\}"))
        return 2 * instruction.shapes[0].elements * _sizes(instruction, computation, 0, contracted)
    if instruction.op == "convolution":
        return _convolution_flops(instruction, computation)
    if instruction.op == "custom-call" and "__cublas$" in (instruction.find(r'custom_call_target="([^"]*)"') or ""):
        contracted = _dims(re.sub(r'"', "", instruction.find(r'"lhs_contracting_dimensions":\[([^\]]*)\]') or ""))
        return 2 * instruction.shapes[0].elements * _sizes(instruction, computation, 0, contracted)
    return 0


def _sizes(instruction: Instruction, computation: Computation, operand: int, dims: list[int]) -> int:
    shape = computation[instruction.operands[operand]].shapes[0]
    return math.prod(shape.dims[at] for at in dims)


def _dims(text: str | None) -> list[int]:
    return [int(n) for n in (text or "").split(",") if n]


def _convolution_flops(instruction: Instruction, computation: Computation) -> int:
    """TPUs turn matrix products into convolutions, batch dimensions into windows that meet one position each.

    Counted as XLA's HloCostAnalysis does: positions of the window that fall on the input, not on padding or between
    its dilated elements.
    """
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes)
    assert labels is not None, instruction.attributes
    left, right, out = labels.groups()
    lhs, rhs = (computation[name].shapes[0].dims for name in instruction.operands[:2])
    result = instruction.shapes[0].dims
    window = _window(instruction.find(r"window=\{([^}]*)\}") or "", len(left) - 2)
    valid = 1
    for at in range(len(left) - 2):
        label = str(at)
        valid *= _valid_positions(lhs[left.index(label)], rhs[right.index(label)], result[out.index(label)], window[at])
    return 2 * result[out.index("b")] * result[out.index("f")] * rhs[right.index("i")] * valid


def _window(text: str, dimensions: int) -> list[dict[str, int]]:
    """stride, low padding and dilations of each spatial dimension."""
    fields = dict(part.split("=", 1) for part in text.split())

    def per_dimension(name: str, default: int) -> list[int]:
        values = fields[name].split("x") if name in fields else [str(default)] * dimensions
        return [int(value.split("_")[0]) for value in values]

    names = {"stride": 1, "pad": 0, "lhs_dilate": 1, "rhs_dilate": 1}
    columns = {name: per_dimension(name, default) for name, default in names.items()}
    return [{name: column[at] for name, column in columns.items()} for at in range(dimensions)]


def _valid_positions(size: int, kernel: int, out: int, window: dict[str, int]) -> int:
    """How many pairs of output and kernel position meet an element of the input along one dimension."""
    at = np.arange(out)[:, None] * window["stride"] - window["pad"] + np.arange(kernel) * window["rhs_dilate"]
    return int(((at % window["lhs_dilate"] == 0) & (at >= 0) & (at // window["lhs_dilate"] < size)).sum())


def memory_traffic(program: Program) -> int:
    """Bytes that one device reads and writes in its main memory in a run: operands and results of what it executes.

    An estimate: fusions count what they slice from an operand rather than the whole, and in-place updates what they
    write; caches are not modelled. What stays in a TPU's vector memory is not counted.
    """
    return sum(cost.times * cost.bytes for cost in costs(program))


def _main(instruction: Instruction) -> int:
    """Bytes of the result in main memory."""
    return sum(shape.bytes for shape in instruction.shapes if shape.space == 0)


def _traffic(program: Program, instruction: Instruction, computation: Computation) -> int:
    if instruction.op in _FREE or instruction.op.endswith("-done"):
        return 0
    operands = [computation[name] for name in instruction.operands if name in computation]
    fused = program.fused(instruction)
    if fused is None:
        if instruction.op == "dynamic-update-slice":
            return 2 * _main(operands[1])
        if instruction.op in ("dynamic-slice", "gather", "slice"):
            return 2 * _main(instruction)
        if instruction.op.endswith("-start") and len(instruction.shapes) > 1:
            return _main(instruction)  # its result names the operands too
        return _main(instruction) + sum(map(_main, operands))
    read = sum(_read_of(fused, at, operand) for at, operand in enumerate(operands))
    return read + _written(fused, instruction)


def _read_of(fused: Computation, index: int, operand: Instruction) -> int:
    """Bytes of a fusion's operand that it reads: less than all where it only slices it or updates a slice of it."""
    inner = next((one for one in fused.values() if one.op == "parameter" and one.literal == str(index)), None)
    if inner is None:
        return 0
    readers = [one for one in fused.values() if inner.name in one.operands]
    if readers and all(one.op in ("dynamic-slice", "slice", "gather") for one in readers):
        return min(sum(one.bytes for one in readers), _main(operand))
    if readers and all(one.op == "dynamic-update-slice" and one.operands[0] == inner.name for one in readers):
        return 0
    return _main(operand)


def _written(fused: Computation, instruction: Instruction) -> int:
    """Bytes that a fusion writes: of an in-place update only the slice."""
    root = next((one for one in fused.values() if one.root), None)
    roots = [root] if root is not None and root.op != "tuple" else []
    if root is not None and root.op == "tuple":
        roots = [fused[name] for name in root.operands if name in fused]
    if len(roots) != len(instruction.shapes):
        return _main(instruction)
    return sum(
        fused[one.operands[1]].bytes if one.op == "dynamic-update-slice" and one.operands[1] in fused else shape.bytes
        for one, shape in zip(roots, instruction.shapes, strict=True)
        if shape.space == 0
    )
