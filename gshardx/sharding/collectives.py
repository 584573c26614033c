"""What a compiled program sends between devices, read from its optimised HLO, and budgets that hold it to that.

GShard's promise (arXiv 2006.16668 section 3) is that annotations make the partitioner emit all-to-alls; here it is
counted: operation, mesh axes, how often a step, bytes of each device.
"""

import dataclasses
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from gshardx.errors import BadInput
from gshardx.sharding.hlo import Computation, Instruction, Program, parse

OPS = (
    "all-to-all",
    "ragged-all-to-all",
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "collective-permute",
    "collective-broadcast",
)
REDUCTIONS = ("all-reduce", "reduce-scatter")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One kind of sending, added up over a run of the program.

    Attributes:
        op: one of ``OPS``.
        axes: the mesh axes that it crosses, in the mesh's order.
        count: how often a run executes it; asynchronous pairs once, inside loops as often as they turn.
        bytes_per_device: of what one device puts in, over all ``count`` times. A ragged exchange counts its whole
            buffer, the most that it may send.
        source: ``file:line`` that it came from; of the largest, where several were added up.
        op_name: the path of the JAX operation, likewise.
    """

    op: str
    axes: tuple[str, ...]
    count: int
    bytes_per_device: int
    source: str = ""
    op_name: str = ""

    def __str__(self) -> str:
        return f"{self.count} {self.op} over {'*'.join(self.axes) or 'none'}, {self.bytes_per_device:,} bytes a device"


def collectives(compiled: jax.stages.Compiled | Program | str, mesh: Mesh) -> list[Collective]:
    """Every collective instruction of a program compiled for ``mesh``, in the order of its text.

    Those whose groups are single devices are left out: they send nothing.

    Args:
        compiled: what ``jax.jit(f).lower(...).compile()`` gives, its text, or the parsed text.
        mesh: the mesh that the program was compiled for; names the axes.
    """
    if isinstance(compiled, jax.stages.Compiled):
        compiled = compiled.as_text() or ""
    program = parse(compiled) if isinstance(compiled, str) else compiled
    found = []
    for sent in _sent(program):
        axes = _axes(_groups(sent.instruction, mesh.size), mesh)
        if axes:
            place = sent.instruction if sent.instruction.op_name else sent.told_by
            found.append(
                Collective(
                    sent.op,
                    axes,
                    sent.times,
                    sent.times * _operand_bytes(sent.op, sent.instruction, sent.computation),
                    program.source(place),
                    place.op_name,
                )
            )
    return found


class _Sent(NamedTuple):
    """A collective instruction, where its operands are, and the instruction of the program that executes it."""

    op: str
    instruction: Instruction
    computation: Computation
    times: int
    told_by: Instruction


def _sent(program: Program) -> Iterator[_Sent]:
    """Collectives that a run executes, inside fusions too.

    XLA fuses them for TPUs. An asynchronous one stands in the fusion that starts it, in the products that it goes on
    beside, and in the fusion that ends it, all with one channel: the start counts. An all-reduce of which the fusion
    keeps a slice is a reduce-scatter.
    """
    executed = list(program.executed())
    started = {
        inner.find(_CHANNEL)
        for one in executed
        if one.instruction.name.startswith(_START)
        for inner, _ in _within(program, one.instruction)
    }
    for instruction, computation, times in executed:
        if _op(instruction) in OPS:
            yield _Sent(_op(instruction), instruction, computation, times, instruction)
        for inner, fused in _within(program, instruction):
            if instruction.name.startswith(_START) or inner.find(_CHANNEL) not in started:
                kept = inner.op == "all-reduce" and instruction.bytes < inner.bytes
                yield _Sent("reduce-scatter" if kept else _op(inner), inner, fused, times, instruction)


_START, _CHANNEL = "async-collective-start", r"channel_id=(\d+)"


def _within(program: Program, instruction: Instruction) -> Iterator[tuple[Instruction, Computation]]:
    """Collectives of a fusion, and of fusions inside it."""
    fused = program.fused(instruction)
    for inner in (fused or {}).values():
        if fused is not None and _op(inner) in OPS:
            yield inner, fused
        yield from _within(program, inner)


def _op(instruction: Instruction) -> str:
    return instruction.op.removesuffix("-start")


def totals(found: Iterable[Collective]) -> list[Collective]:
    """Collectives added up by operation and axes, largest first."""
    sums: dict[tuple[str, tuple[str, ...]], list[Collective]] = {}
    for one in found:
        sums.setdefault((one.op, one.axes), []).append(one)
    added = []
    for same in sums.values():
        largest = max(same, key=lambda one: one.bytes_per_device)
        added.append(
            dataclasses.replace(
                largest,
                count=sum(one.count for one in same),
                bytes_per_device=sum(one.bytes_per_device for one in same),
            )
        )
    return sorted(added, key=lambda one: (-one.bytes_per_device, one.op, one.axes))


@dataclasses.dataclass(frozen=True)
class Allowance:
    """How much of one kind of sending a step may do; None: any amount.

    ``least`` and ``least_bytes`` catch the opposite mistake: an exchange that has vanished because the partitioner
    found another way.
    """

    op: str
    axes: tuple[str, ...]
    count: int | None = None
    bytes_per_device: int | None = None
    least: int = 0
    least_bytes: int = 0

    def __post_init__(self) -> None:
        if self.op not in OPS:
            raise BadInput(f"budget: no collective is called {self.op!r}; use one of {', '.join(OPS)}")


@dataclasses.dataclass(frozen=True)
class Budget:
    """What a step may send. What no allowance names, it may not send at all.

    Attributes:
        allowances: at most one for the same operation and axes.
        small: bytes of a device, all such collectives together, below which reductions (all-reduce) over any axes need
            no allowance: losses, counts and statistics.
        reduced: bytes of a device in all reductions (all-reduce, reduce-scatter) that cross an axis, together, by axis.
            The partitioner may reduce over an axis alone or with others at once; what it does twice shows only here.
    """

    allowances: tuple[Allowance, ...] = ()
    small: int = 0
    reduced: Mapping[str, int] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        kinds = [(one.op, one.axes) for one in self.allowances]
        for op, axes in kinds:
            if kinds.count((op, axes)) > 1:
                raise BadInput(f"budget: {op} over {'*'.join(axes)} is allowed twice; add the two up")

    def times(self, n: int) -> "Budget":
        """Of a step that does ``n`` times as much."""

        def scaled(one: Allowance) -> Allowance:
            count = None if one.count is None else n * one.count
            most = None if one.bytes_per_device is None else n * one.bytes_per_device
            return Allowance(one.op, one.axes, count, most, n * one.least, n * one.least_bytes)

        reduced = {axis: n * most for axis, most in self.reduced.items()}
        return Budget(tuple(map(scaled, self.allowances)), n * self.small, reduced)

    def breaches(self, found: Iterable[Collective]) -> list[str]:
        """One line for each way in which ``found`` leaves the budget; none if it keeps to it."""
        found = totals(found)
        sent = {(one.op, one.axes): one for one in found}
        allowed = {(one.op, one.axes): one for one in self.allowances}
        lines = []
        small = [one for one in found if one.op == "all-reduce" and (one.op, one.axes) not in allowed]
        if sum(one.bytes_per_device for one in small) > self.small:
            lines += [f"{_told(one)}: the budget allows {self.small:,} bytes of such reductions" for one in small]
        for one in found:
            if one not in small and (one.op, one.axes) not in allowed:
                lines.append(f"{_told(one)}: the budget allows none")
        for key, allowance in allowed.items():
            lines += _against(allowance, sent.get(key, Collective(allowance.op, allowance.axes, 0, 0)))
        for axis, most in self.reduced.items():
            crossing = [one for one in found if axis in one.axes and one.op in REDUCTIONS]
            if sum(one.bytes_per_device for one in crossing) > most:
                parts = " and ".join(_told(one) for one in crossing)
                lines.append(f"{parts}: the budget allows {most:,} bytes of all that is reduced across {axis}")
        return lines


def _against(allowance: Allowance, one: Collective) -> list[str]:
    lines = []
    if allowance.count is not None and one.count > allowance.count:
        lines.append(f"{_told(one)}: the budget allows {allowance.count}")
    if allowance.bytes_per_device is not None and one.bytes_per_device > allowance.bytes_per_device:
        lines.append(f"{_told(one)}: the budget allows {allowance.bytes_per_device:,} bytes")
    if one.count < allowance.least:
        lines.append(f"{_told(one)}: the budget expects {allowance.least} or more")
    if one.bytes_per_device < allowance.least_bytes:
        lines.append(f"{_told(one)}: the budget expects {allowance.least_bytes:,} bytes or more")
    return lines


def _told(one: Collective) -> str:
    return f"{one} ({one.source} {one.op_name})" if one.source or one.op_name else str(one)


def _operand_bytes(op: str, instruction: Instruction, computation: Computation) -> int:
    # A ragged exchange also takes its output buffer, offsets and sizes; only the first operand travels.
    operands = instruction.operands[:1] if op == "ragged-all-to-all" else instruction.operands
    return sum(computation[name].bytes for name in operands if name in computation)


def _groups(instruction: Instruction, devices: int) -> np.ndarray:
    """Positions of devices, a row a group, from any of XLA's notations: pairs, listed, an iota, or axes of a mesh."""
    text = instruction.attributes
    listed = re.search(r"(?:replica_groups|source_target_pairs)=\{(\{[\d,{}]*\})\}", text)
    if listed:
        rows = [[int(n) for n in row.split(",")] for row in re.findall(r"\{([\d,]+)\}", listed.group(1))]
        return np.array(rows, dtype=int)
    iota = re.search(r"replica_groups=\[([\d,]+)\]<=(\[[\d,]+\]\S*)", text)
    if iota:
        return _iota(iota.group(2)).reshape(_integers(iota.group(1)))
    axes = re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((\S+)\))? \{([^}]*)\}", text)
    if axes:
        return _along_axes(axes.group(1), axes.group(2), axes.group(3))
    unknown = re.search(r"(?:replica_groups|source_target_pairs)=(?!\{\})\S*", text)
    if unknown:
        raise ValueError(f"{instruction.name}: a notation of device groups that is not known here: {unknown.group()}")
    return np.arange(devices).reshape(1, devices)


def _iota(text: str) -> np.ndarray:
    """``[2,4]T(1,0)``: 0 to 7 in that shape, transposed."""
    found = re.match(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
    assert found is not None
    shape = _integers(found.group(1))
    ids = np.arange(math.prod(shape)).reshape(shape)
    return ids.transpose(_integers(found.group(2))) if found.group(2) else ids


def _along_axes(sizes: str, order: str | None, over: str) -> np.ndarray:
    """Groups along some axes of XLA's own mesh, whose axes need not be those of the JAX mesh."""
    shape = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", sizes)}
    ids = _iota(order) if order else np.arange(math.prod(shape.values()))
    ids = ids.reshape(tuple(shape.values()))
    for name, before, size in re.findall(r"'([^']+)':\((\d+)\)(\d+)", over):  # a part of an axis
        ids, shape = _split_axis(ids, shape, name, int(before), int(size))
        over = over.replace(f"'{name}':({before}){size}", f"'{name}:{before}'")
    chosen = [list(shape).index(name) for name in re.findall(r"'([^']+)'", over)]
    width = math.prod(ids.shape[at] for at in chosen)
    return np.moveaxis(ids, chosen, range(-len(chosen), 0)).reshape(-1, width)


def _split_axis(
    ids: np.ndarray, shape: Mapping[str, int], name: str, before: int, size: int
) -> tuple[np.ndarray, dict[str, int]]:
    """Cut an axis in three, major to minor: ``before`` positions, then the ``size`` that are meant, then the rest."""
    parts: dict[str, int] = {}
    for axis, length in shape.items():
        if axis == name:
            parts |= {f"{name}<": before, f"{name}:{before}": size, f"{name}>": length // (before * size)}
        else:
            parts[axis] = length
    return ids.reshape(tuple(parts.values())), parts


def _integers(text: str) -> list[int]:
    return [int(n) for n in text.split(",")]


def _axes(groups: np.ndarray, mesh: Mesh) -> tuple[str, ...]:
    """The mesh axes along which the devices of a group differ."""
    places: Sequence[Any] = np.unravel_index(groups, mesh.devices.shape)
    return tuple(axis for axis, place in zip(mesh.axis_names, places, strict=True) if (place != place[:, :1]).any())
