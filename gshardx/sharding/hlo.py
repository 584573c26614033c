"""Optimised HLO as XLA prints it (jax 0.10 to 0.12): instructions, how often each runs, and where it came from.

A program is a set of computations, and the entry calls the others: a loop's body runs as often as its trip count,
branches and asynchronous calls once. A fusion is one instruction to the device; its own computation is not walked.
"""

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import NamedTuple


class Shape(NamedTuple):
    """One array: XLA's name of its type, its dimensions, and where it lies: 0 is the device's main memory, 1 a TPU's
    vector memory."""

    dtype: str
    dims: tuple[int, ...]
    space: int = 0

    @property
    def elements(self) -> int:
        return math.prod(self.dims)

    @property
    def bytes(self) -> int:
        """Without the padding of its layout; sizes below a byte are packed, pred takes one."""
        digits = re.match(r"[a-z]+(\d+)", self.dtype)
        bits = 8 if self.dtype == "pred" else int(digits.group(1)) if digits else 0
        return math.ceil(self.elements * bits / 8)


class Instruction(NamedTuple):
    """One line of a computation.

    Attributes:
        shapes: of the result; several for a tuple.
        operands: names of instructions of the same computation.
        literal: what stands in the brackets, for constants and parameters.
        attributes: the rest of the line, unread.
    """

    name: str
    op: str
    shapes: tuple[Shape, ...]
    operands: tuple[str, ...]
    literal: str
    attributes: str
    root: bool

    @property
    def bytes(self) -> int:
        return sum(shape.bytes for shape in self.shapes)

    def find(self, pattern: str) -> str | None:
        """The first group of a regular expression in the attributes."""
        found = re.search(pattern, self.attributes)
        return found.group(1) if found else None

    @property
    def op_name(self) -> str:
        """The path of the JAX operation that it came from, ``jit(step)/jvp()/.../dot_general``."""
        return self.find(r'op_name="([^"]*)"') or ""


Computation = Mapping[str, Instruction]
"""Instructions by name, in their order."""


class Executed(NamedTuple):
    """An instruction outside fusions, the computation it stands in, and how often a run of the program executes it."""

    instruction: Instruction
    computation: Computation
    times: int


@dataclasses.dataclass(frozen=True)
class Program:
    """A parsed module.

    Attributes:
        computations: by name.
        entry: the name of the one that runs.
        sources: ``file:line`` of each stack frame, innermost first, by the frame's number.
    """

    computations: Mapping[str, Computation]
    entry: str
    sources: Mapping[int, tuple[str, ...]]

    def executed(self) -> Iterator[Executed]:
        """Every instruction that a run executes; a branch counts as taken, a loop of unknown length as one pass."""
        yield from self._executed(self.entry, 1)

    def _executed(self, name: str, times: int) -> Iterator[Executed]:
        computation = self.computations[name]
        for instruction in computation.values():
            yield Executed(instruction, computation, times)
            passes = self.trip_count(instruction) if instruction.op == "while" else 1
            repeat = times * (1 if passes is None else passes)
            for called in self.called(instruction):
                yield from self._executed(called, repeat)

    def called(self, instruction: Instruction) -> tuple[str, ...]:
        """Computations whose instructions the device runs one by one: bodies, branches, calls; not fusions."""
        if instruction.op == "while":
            keys = r"body"
        elif instruction.op == "conditional":
            keys = r"true_computation|false_computation|branch_computations"
        elif instruction.op in ("call", "call-start", "async-start"):
            keys = r"to_apply|calls"
        else:
            return ()
        found = re.findall(rf"\b(?:{keys})=(\{{[^}}]*\}}|%?[\w.\-]+)", instruction.attributes)
        return tuple(name for text in found for name in re.findall(r"[\w.\-]+", text) if name in self.computations)

    def fused(self, instruction: Instruction) -> Computation | None:
        """The computation of a fusion."""
        name = instruction.find(r"\bcalls=%?([\w.\-]+)")
        return self.computations.get(name) if instruction.op in ("fusion", "fusion-start") and name else None

    def trip_count(self, loop: Instruction) -> int | None:
        """Passes of a ``while``: what XLA wrote beside it, else the constant that its counter is compared with."""
        known = loop.find(r'"known_trip_count":\{"n":"(\d+)"\}')
        if known:
            return int(known)
        condition = self.computations[loop.find(r"condition=%?([\w.\-]+)") or ""]
        inside = [fused for one in condition.values() if (fused := self.fused(one)) is not None]
        counts = [
            int(one.literal)
            for computation in (condition, *inside)
            for one in computation.values()
            if one.op == "constant" and one.shapes[0][:2] in (("s32", ()), ("s64", ()), ("u32", ()))
        ]
        return counts[0] if len(counts) == 1 else None

    def source(self, instruction: Instruction) -> str:
        """``file:line`` that the instruction came from: the innermost frame outside this package's annotations."""
        frame = instruction.find(r"stack_frame_id=(\d+)")
        if frame:
            places = self.sources.get(int(frame), ())
            return next((place for place in places if "gshardx/sharding/" not in place), "".join(places[:1]))
        file, line = instruction.find(r'source_file="([^"]*)"'), instruction.find(r"source_line=(\d+)")
        return f"{_short(file)}:{line}" if file else ""

    @cached_property
    def instructions(self) -> int:
        """How many there are, in all computations, fusions included; constants do nothing and are not counted."""
        return sum(one.op != "constant" for computation in self.computations.values() for one in computation.values())


def parse(text: str) -> Program:
    """Read a module's text, as ``jax.stages.Compiled.as_text()`` gives it."""
    computations: dict[str, dict[str, Instruction]] = {}
    tables: dict[str, list[str]] = {}
    entry, table = "", ""
    current: dict[str, Instruction] | None = None
    for line in text.splitlines():
        header = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line)
        if header:
            current = computations[header.group(2)] = {}
            entry = header.group(2) if header.group(1) else entry
        elif line.startswith("}"):
            current = None
        elif current is not None:
            instruction = _instruction(line)
            if instruction:
                current[instruction.name] = instruction
        elif line in _TABLES:
            table = line
        elif table and line:
            tables.setdefault(table, []).append(line)
    return Program(computations, entry, _frames(tables))


_SHAPE = r"\b([a-z]+\d*[a-z0-9]*)\[([\d,<=]*)\](?:\{[^}]*?(?:S\((\d+)\)[^}]*)?\})?"
"""Type, dimensions, and the memory space that stands in the layout."""
_TABLES = ("FileNames", "FunctionNames", "FileLocations", "StackFrames")


def _instruction(line: str) -> Instruction | None:
    head = re.match(r"\s*(ROOT )?%?([\w.\-]+) = ", line)
    if not head:
        return None
    rest = line[head.end() :]
    end = _closing(rest) + 1 if rest.startswith("(") else rest.index(" ")
    shapes = tuple(
        Shape(dtype, tuple(int(n) for n in dims.replace("<=", "").split(",") if n), int(space or 0))
        for dtype, dims, space in re.findall(_SHAPE, rest[:end])
    )
    call = re.match(r"\s*([\w\-]+)\(", rest[end:])
    if not call:
        return None
    arguments = rest[end + call.end() - 1 :]
    close = _closing(arguments)
    inside = arguments[1:close]
    return Instruction(
        name=head.group(2),
        op=call.group(1),
        shapes=shapes,
        operands=tuple(re.findall(r"%([\w.\-]+)", inside)),
        literal=inside,
        attributes=arguments[close + 1 :],
        root=bool(head.group(1)),
    )


def _closing(text: str) -> int:
    """Where the bracket that opens ``text`` closes."""
    depth = 0
    for at in re.finditer(r"[()]", text):
        depth += 1 if at.group() == "(" else -1
        if depth == 0:
            return at.start()
    raise ValueError(f"unbalanced brackets: {text[:80]}")


def _frames(tables: Mapping[str, list[str]]) -> dict[int, tuple[str, ...]]:
    """``file:line`` from each frame outwards."""

    def numbered(name: str) -> Iterator[tuple[int, str]]:
        for line in tables.get(name, ()):
            number, _, rest = line.partition(" ")
            yield int(number), rest

    def field(text: str, name: str) -> int:
        found = re.search(rf"{name}=(\d+)", text)
        return int(found.group(1)) if found else 0

    files = {number: _short(rest.strip('"')) for number, rest in numbered("FileNames")}
    places = {
        number: f"{files.get(field(rest, 'file_name_id'), '?')}:{field(rest, 'line')}"
        for number, rest in numbered("FileLocations")
    }
    frames = {
        number: (places.get(field(rest, "file_location_id"), "?"), field(rest, "parent_frame_id") - 1)
        for number, rest in numbered("StackFrames")  # XLA prints a parent's number plus 1, so that 1 is none
    }

    def outwards(number: int) -> Iterator[str]:
        for _ in frames:
            if number not in frames:
                return
            place, number = frames[number]
            yield place

    return {number: tuple(outwards(number)) for number in frames}


def _short(path: str) -> str:
    return "/".join(path.split("/")[-3:])
