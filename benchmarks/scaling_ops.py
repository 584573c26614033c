"""Where compiled programs of the scaling study part: in which of XLA's passes, and in which instructions.

    python benchmarks/scaling_ops.py --pairs 36l_2048e:2048,128     # a config on two numbers of chips
    python benchmarks/scaling_ops.py --partitioned 36l_2048e        # instructions after the partitioner, by chips
    python benchmarks/scaling_ops.py --partitioned 36l_2048e --pairs 36l_2048e:2048,128 --write docs/scaling.md

Compiles what scaling.py compiles, while XLA writes the program down around each pass that changes it (some 300 MB a
case). A case is stopped once it has got as far as is asked for. With --dumps those files are kept, and read the next
time. Instructions are counted as everywhere in the study: without constants, fusions included.
"""

import argparse
import difflib
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from scaling import NO_FIT, ROOT, SHAPES, Case, command, configs
from timing import Table, filled, goal

from gshardx.sharding.hlo import Instruction, Program, parse

JUMP = 50
"""Instructions by which the difference must change from pass to pass for that to be told."""
MOST = 8
"""Kinds of instructions told, those that differ most."""
FINISHED = "*.after_optimizations_after_buffer_assignment.txt"
"""Written last, before code is generated, which takes longest and changes no instruction."""
OPTIMIZED, PARTITIONED = "*.jit_train.*.after_optimizations.txt", "*.after_*spmd-partitioning.before_*.txt"
NUMBERED = "*.jit_train.*.[0-9][0-9][0-9][0-9].*.txt"


class Stage(NamedTuple):
    """The program behind a pass."""

    name: str
    instructions: int


class Compiled(NamedTuple):
    """Stages in order, from JAX's program to the optimised one, which is parsed too."""

    stages: list[Stage]
    program: Program


class Dumps(NamedTuple):
    """What XLA wrote, a folder a case."""

    folder: Path

    def of(self, case: Case, *, partitioned: bool = False) -> Path:
        """Of one case, compiled if it is not there; ``partitioned``: no further than the partitioner."""
        folder = self.folder / f"{case.config.split('/')[1]}-{case.chips}"
        if not is_finished(folder) and not (partitioned and is_partitioned(folder)):
            print(f"{case.config} on {case.chips} chips", file=sys.stderr, flush=True)
            compile_into(folder, case, stop=is_partitioned if partitioned else is_finished)
        return folder


def is_partitioned(folder: Path) -> bool:
    """The partitioner's program is there, and so is one behind it: XLA has finished writing it."""
    return any(file > found for found in folder.glob(PARTITIONED) for file in folder.glob(NUMBERED))


def is_finished(folder: Path) -> bool:
    return any(folder.glob(FINISHED))


def compile_into(folder: Path, case: Case, stop: Callable[[Path], bool]) -> None:
    """Let the planner compile ``case``, as in the study, and XLA write into ``folder``, until ``stop``."""
    flags = f"--xla_dump_to={folder.absolute()} --xla_dump_hlo_pass_re=.* --xla_dump_hlo_module_re=jit_train"
    with tempfile.TemporaryFile("w+") as err:
        environment = os.environ | {"XLA_FLAGS": flags}
        process = subprocess.Popen(command(case), cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=err)
        while process.poll() is None:
            if stop(folder):
                process.kill()
                process.wait()
                return
            time.sleep(0.5)
        if process.returncode not in (0, NO_FIT):
            err.seek(0)
            raise SystemExit(err.read())


def read(folder: Path) -> Compiled:
    """What XLA wrote of a program that it has finished."""

    def only(pattern: str) -> str:
        (file,) = folder.glob(pattern)
        return file.read_text()

    optimized = only(OPTIMIZED)
    stages = [Stage("JAX's own program", count(only("*.jit_train.*.before_optimizations.txt")))]
    for file in sorted(folder.glob(NUMBERED)):
        name = re.sub(r".*\.\d{4}\.(.*?)(\.before_.*)?\.txt", r"\1", file.name)
        stages.append(Stage(name, count(file.read_text())))
    stages.append(Stage("memory assignment: the optimised program", count(optimized)))
    return Compiled(stages, parse(optimized))


def count(text: str) -> int:
    """Instructions in a module's text; what ``Program.instructions`` says, without parsing every line of it."""
    return sum(" constant(" not in line for line in re.findall(r"^ +(?:ROOT )?%?[\w.\-]+ = .*", text, re.MULTILINE))


def partings(left: Sequence[Stage], right: Sequence[Stage]) -> Iterator[tuple[str, int, int]]:
    """Of the stages that both have the first, the partitioner's, those on both sides of a jump, and the last."""
    names = [[stage.name for stage in stages] for stages in (left, right)]
    blocks = difflib.SequenceMatcher(None, *names, autojunk=False).get_matching_blocks()
    shared = [
        (name, a, b)
        for at, to, size in blocks
        for (name, a), (_, b) in zip(left[at : at + size], right[to : to + size], strict=True)
    ]
    more = [b - a for _, a, b in shared]
    told, last = {0, len(shared) - 1}, 0
    for at, (name, _, _) in enumerate(shared):
        jumped = abs(more[at] - more[last]) >= JUMP
        if jumped or name.endswith("spmd-partitioning"):
            told |= {at - 1, at} if jumped else {at}
            last = at
    yield from (shared[at] for at in sorted(told))


def differing(left: Program, right: Program, kind: Callable[[Program, Instruction], str]) -> str:
    """Kinds of instructions by how many more ``right`` has; those without a kind are left out."""

    def counted(program: Program) -> Counter[str]:
        every = [one for each in program.computations.values() for one in each.values() if one.op != "constant"]
        return Counter(kind(program, one) for one in every)

    before, after = counted(left), counted(right)
    more = {key: after[key] - before[key] for key in before | after if key and after[key] != before[key]}
    largest = sorted(more, key=lambda key: (-abs(more[key]), key))[:MOST]
    return ", ".join(f"{key} {more[key]:+}" for key in largest) or "none"


def pair_table(config: str, chips: tuple[int, int], dumps: Dumps) -> Iterator[str]:
    few, many = (f"{n:,} chips" for n in chips)
    left, right = (read(dumps.of(Case(config, n))) for n in chips)
    rows = [
        {"instructions behind": name, few: a, many: b, "more": f"{b - a:+,}", "%": f"{100 * (b / a - 1):+.2f}"}
        for name, a, b in partings(left.stages, right.stages)
    ]
    again = [sum(".remat" in name for each in c.program.computations.values() for name in each) for c in (left, right)]
    notes = [
        f"optimised, by opcode: {differing(left.program, right.program, lambda _, one: one.op)}",
        f"of those with a line, by line: {differing(left.program, right.program, Program.source)}",
        f"made again to save memory (.remat in their names): {again[0]} and {again[1]}",
    ]
    yield from Table(f"{config.split('/')[1]}, {few} and {many}", rows, notes).markdown()


def partitioned_table(names: Sequence[str], dumps: Dumps) -> Iterator[str]:
    """Instructions behind the partitioner by number of chips, and what they differ by."""
    rows, spreads = [], []
    for config in names:
        found = {}
        for chips in SHAPES:
            (file,) = dumps.of(Case(config, chips), partitioned=True).glob(PARTITIONED)
            found[chips] = count(file.read_text())
        spreads.append(100 * (max(found.values()) / min(found.values()) - 1))
        cells = {f"{chips:,} chips": value for chips, value in found.items()}
        rows.append({"model": config.split("/")[1], **cells, "%": f"{spreads[-1]:.2f}"})
    what = "instructions behind the partitioner, most over fewest, differ by"
    yield from Table("Instructions behind the partitioner", rows, [goal(what, max(spreads), 1, unit=" %")]).markdown()


def pair(text: str) -> tuple[str, tuple[int, int]]:
    """From ``36l_2048e:2048,128``."""
    found = re.fullmatch(r"(\w+):(\d+),(\d+)", text)
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r}: write CONFIG:CHIPS,CHIPS")
    return config(found[1]), (int(found[2]), int(found[3]))


def config(name: str) -> str:
    known = configs()
    if name not in known:
        raise argparse.ArgumentTypeError(f"no config {name}; there are {', '.join(known)}")
    return known[name]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", nargs="+", type=pair, default=[], metavar="CONFIG:CHIPS,CHIPS")
    parser.add_argument("--partitioned", nargs="+", type=config, default=[], metavar="CONFIG")
    parser.add_argument("--dumps", type=Path, metavar="FOLDER", help="keep what XLA writes here; read what is here")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="also between the markers in PAGE")
    args = parser.parse_args()
    if not args.pairs and not args.partitioned:
        parser.error("give --pairs or --partitioned")
    page = args.write.read_text() if args.write else ""
    with tempfile.TemporaryDirectory() as temporary:
        dumps = Dumps(args.dumps or Path(temporary))
        told = [*partitioned_table(args.partitioned, dumps)] if args.partitioned else []
        for name, chips in args.pairs:
            told += pair_table(name, chips, dumps)
    text = "\n".join(told)
    print(text, flush=True)
    if args.write:
        args.write.write_text(filled(page, "scaling_ops", text))


if __name__ == "__main__":
    main()
