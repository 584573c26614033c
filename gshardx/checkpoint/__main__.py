"""``python -m gshardx.checkpoint list | inspect | verify | diff | export | prune``: look after what a run has saved."""

import argparse
from collections.abc import Callable
from pathlib import Path

from gshardx.arguments import CommandParser
from gshardx.checkpoint.arrays import FLOATS
from gshardx.checkpoint.compare import differences
from gshardx.checkpoint.export import export
from gshardx.checkpoint.manifest import damage, read_manifest, score_of
from gshardx.checkpoint.places import Saved, checkpoints_of, find, folders, why_unread
from gshardx.checkpoint.prune import kept, remove
from gshardx.checkpoint.store import finished_steps
from gshardx.checkpoint.tables import aligned, arrays_table, difference_row, steps_table
from gshardx.cli import run_command
from gshardx.errors import BadInput
from gshardx.lock import hold

DESCRIPTION = """Look after what a run has saved. A checkpoint is named by RUN_DIR, which means its newest step or that
of --step, or by RUN_DIR/checkpoints/STEP. Exit codes: 0, 1 where verify found damage or diff a difference, 2 bad
input."""


def main(argv: list[str]) -> int:
    parser = CommandParser(prog="python -m gshardx.checkpoint", description=DESCRIPTION)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, said: str, function: Callable[[argparse.Namespace], int]) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=said, description=f"{said[0].upper()}{said[1:]}.")
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
    pruned.add_argument("--keep_best", type=int, default=0, metavar="N", help="those with the least bits per byte, too")
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
    check_item(arguments.item, saved)
    print(saved.folder)
    for line in aligned(arrays_table(saved, arguments.item, arguments.values)):
        print(line)
    return 0


def verify(arguments: argparse.Namespace) -> int:
    bad = 0
    for folder in folders(arguments.path, arguments.step):
        manifest = read_manifest(folder)
        found = why_unread(folder) if manifest is None else damage(folder, manifest.checksum, manifest.files)
        print(f"{folder}: {found or 'good'}", flush=True)
        bad += found is not None
    return 1 if bad else 0


def check_item(item: str, *steps: Saved) -> None:
    """Raise BadInput if none of ``steps`` has it."""
    if not any(item in saved.items for saved in steps):
        there = "; ".join(f"{saved.folder} has {', '.join(saved.items)}" for saved in steps)
        raise BadInput(f"--item {item}: {there}")


def diff(arguments: argparse.Namespace) -> int:
    first, second = find(arguments.path, arguments.step), find(arguments.other, arguments.other_step)
    if arguments.item is not None:
        check_item(arguments.item, first, second)
    rows = [difference_row(one) for one in differences(first, second, arguments.item)]
    if not rows:
        print(f"{first.folder} and {second.folder}: the same numbers")
        return 0
    for line in aligned([("array", "", "entries that differ", "largest", "relative"), *rows]):
        print(line)
    return 1


def export_(arguments: argparse.Namespace) -> int:
    saved = find(arguments.path, arguments.step)
    averaged = "ema" in saved.items  # then these are what inference reads
    arrays = export(saved, arguments.target, ("ema" if averaged else "params", "router"), arguments.dtype)
    print(f"wrote {len(arrays)} arrays of step {saved.step} to {arguments.target}; try: "
          f"python -m gshardx.infer generate --run {arguments.target}")  # fmt: skip
    return 0


def prune(arguments: argparse.Namespace) -> int:
    for name in ("keep_last", "keep_every"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise BadInput(f"--{name} {value}: must be 1 or more")
    if arguments.keep_best < 0:
        raise BadInput(f"--keep_best {arguments.keep_best}: must be 0 or more")
    folder = checkpoints_of(arguments.path)
    with hold(arguments.path, "RUN_DIR", "trains in it"):
        finished = {step: score_of(folder / str(step)) for step in finished_steps(folder)}
        going = sorted(finished.keys() - kept(finished, arguments.keep_last, arguments.keep_every, arguments.keep_best))
        for step in going:
            if not arguments.dry_run:
                remove(folder / str(step))
            print(f"{folder / str(step)}: {'would go' if arguments.dry_run else 'deleted'}")
    print(f"{len(finished) - len(going)} stay")
    return 0


if __name__ == "__main__":
    run_command(main)
