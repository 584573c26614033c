"""``python -m gshardx.checkpoint list | inspect | verify | diff | export | prune``: look after what a run has saved."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from gshardx.checkpoint.arrays import FLOATS
from gshardx.checkpoint.compare import differences
from gshardx.checkpoint.export import export
from gshardx.checkpoint.lock import hold
from gshardx.checkpoint.manifest import damage
from gshardx.checkpoint.places import checkpoints_of, find
from gshardx.checkpoint.prune import kept, remove
from gshardx.checkpoint.store import finished_steps, step_folders
from gshardx.checkpoint.tables import aligned, arrays_table, steps_table
from gshardx.cli import run_command
from gshardx.errors import BadInput

DESCRIPTION = """Look after what a run has saved. A checkpoint is named by RUN_DIR, which means its newest step or that
of --step, or by RUN_DIR/checkpoints/STEP. Exit codes: 0, 1 where verify found damage or diff a difference, 2 bad
input."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise BadInput(f"{message} (see {self.prog} --help)")


def main(argv: list[str]) -> int:
    parser = _Parser(prog="python -m gshardx.checkpoint", description=DESCRIPTION, allow_abbrev=False)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, said: str, function: Callable[[argparse.Namespace], int]) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=said, description=f"{said[0].upper()}{said[1:]}.", allow_abbrev=False)
        added.add_argument("path", type=Path, metavar="RUN_DIR")
        added.set_defaults(function=function)
        return added

    command("list", "the steps that were saved", list_)
    one = command("inspect", "the arrays of a step", inspect)
    one.add_argument("--item", default="params", help="params, optimizer, ema, ... (default params)")
    one.add_argument("--values", action="store_true", help="read them: root mean square, largest, not finite")
    checked = command("verify", "whether all files are as they were saved, of every step or of --step", verify)
    compared = command("diff", "the arrays in which two steps differ", diff)
    compared.add_argument("other", type=Path, metavar="RUN_DIR")
    compared.add_argument("--item", help="of one item only, such as params")
    compared.add_argument("--other_step", type=int, metavar="N", help="of the second")
    taken = command("export", "write a run of the weights alone, for inference", export_)
    taken.add_argument("target", type=Path, metavar="OUT_DIR")
    taken.add_argument("--dtype", choices=FLOATS, help="of the weights there (default: as they are)")
    for added in (one, checked, compared, taken):
        added.add_argument("--step", type=int, metavar="N", help="this step (default: the newest)")
    pruned = command("prune", "delete steps", prune)
    pruned.add_argument("--keep_last", type=int, required=True, metavar="N", help="the newest so many stay")
    pruned.add_argument("--keep_every", type=int, metavar="N", help="steps that N divides stay too")
    pruned.add_argument("--dry_run", action="store_true", help="say what would go, and leave it")
    arguments = parser.parse_args(argv)
    done: int = arguments.function(arguments)
    return done


def list_(arguments: argparse.Namespace) -> int:
    for line in aligned(steps_table(checkpoints_of(arguments.path))):
        print(line)
    return 0


def inspect(arguments: argparse.Namespace) -> int:
    saved = find(arguments.path, arguments.step)
    items = sorted({name.split("/")[0] for name in saved.manifest.arrays})
    if arguments.item not in items:
        raise BadInput(f"--item {arguments.item}: {saved.folder} has {', '.join(items)}")
    print(saved.folder)
    for line in aligned(arrays_table(saved, arguments.item, arguments.values)):
        print(line)
    return 0


def verify(arguments: argparse.Namespace) -> int:
    if arguments.step is None and arguments.path.parent.name != "checkpoints":
        folder = checkpoints_of(arguments.path)
        steps, finished = step_folders(folder), finished_steps(folder)
    else:
        saved = find(arguments.path, arguments.step)
        folder, steps = saved.folder.parent, [saved.step]
        finished = steps
    bad = 0
    for step in steps:
        found = damage(folder / str(step), find(folder.parent, step).manifest) if step in finished else "never finished"
        print(f"{folder / str(step)}: {found or 'good'}", flush=True)
        bad += found is not None
    return 1 if bad else 0


def diff(arguments: argparse.Namespace) -> int:
    first, second = find(arguments.path, arguments.step), find(arguments.other, arguments.other_step)
    rows = [
        (one.array, one.about, f"{one.entries:,}", f"{one.largest:.3g}", f"{one.relative:.3g}")
        for one in differences(first, second, arguments.item)
    ]
    if not rows:
        print(f"{first.folder} and {second.folder}: the same numbers")
        return 0
    for line in aligned([("array", "", "entries that differ", "largest", "relative"), *rows]):
        print(line)
    return 1


def export_(arguments: argparse.Namespace) -> int:
    saved = find(arguments.path, arguments.step)
    averaged = any(name.startswith("ema/") for name in saved.manifest.arrays)  # then these are what inference reads
    arrays = export(saved, arguments.target, ("ema" if averaged else "params", "router"), arguments.dtype)
    print(f"wrote {len(arrays)} arrays of step {saved.step} to {arguments.target}; try: "
          f"python -m gshardx.infer generate --run {arguments.target}")  # fmt: skip
    return 0


def prune(arguments: argparse.Namespace) -> int:
    for name in ("keep_last", "keep_every"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise BadInput(f"--{name} {value}: must be 1 or more")
    folder = checkpoints_of(arguments.path)
    with hold(arguments.path):
        finished = finished_steps(folder)
        going = sorted(set(finished) - kept(finished, arguments.keep_last, arguments.keep_every))
        for step in going:
            if not arguments.dry_run:
                remove(folder / str(step))
            print(f"{folder / str(step)}: {'would go' if arguments.dry_run else 'deleted'}")
    print(f"{len(finished) - len(going)} stay")
    return 0


if __name__ == "__main__":
    run_command(main)
