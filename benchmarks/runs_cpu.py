"""What a run costs beside its steps: bookkeeping, checkpoints, restores, restarts; prints one table.

    python benchmarks/runs_cpu.py [--parts telemetry stall restore start] [--output FILE]     # about five minutes

Each part has a process of its own and compares within it, in turns: read shares and ratios first, since seconds say as
much about the machine and about who else uses it.
"""

import argparse
import datetime
import json
import logging
import os
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from commands import last_line
from report import Machine, NotMeasured, Row
from timing import Table, cell

TELEMETRY, STALL, RESTORE, START = 1.0, 5.0, 60.0, 15.0
"""Goals: at most % of a step, at most % of a step each 50 steps, at least % of the disk's speed, at most seconds."""
EVERY = 50
"""Steps between two saves."""
ROUNDS = {"telemetry": 32, "stall": 4, "restore": 3, "start": 3}


class Found(NamedTuple):
    rows: list[dict[str, Any]]
    notes: list[str]


def telemetry(found: Row) -> Found:
    ratios = found["ratios"]
    return Found(
        [
            row("telemetry: its calls and the watchdog's beat, of a step", 100 * found["share"], TELEMETRY),
            row("telemetry: steps with it over without, less 1", 100 * (statistics.median(ratios) - 1), TELEMETRY),
        ],
        [
            f"telemetry: a step of {1e3 * found['step_seconds']:.0f} ms on one device; calls "
            f"{1e6 * found['calls_seconds']:.0f} us a step, {1e6 * found['calls_cpu_seconds']:.0f} us of them CPU; "
            f"a beat {1e6 * found['beat_seconds']:.0f} us twice a second; trackers {', '.join(found['trackers'])}; "
            f"with over without {min(ratios):.3f} to {max(ratios):.3f} in {len(ratios)} rounds"
        ],
    )


def stall(found: Row) -> Found:
    step, later = found["median_step_seconds"], found["later_delay_seconds"]
    call = max(found["stall_seconds"], found["save_call_seconds"])
    each = 100 / (EVERY * step)
    return Found(
        [
            row(f"save: the main thread, of {EVERY} steps", each * call, STALL),
            row(f"save: and slower steps beside it, of {EVERY} steps", each * (call + later), STALL),
        ],
        [
            f"save: {found['state_bytes'] / 1e6:.0f} MB, a step of {1e3 * step:.0f} ms; main thread {call:.3f} s; "
            f"{found['steps_beside_write']:.0f} steps beside the write take {later:.3f} s longer; waited for, a save "
            f"takes {found['blocking_seconds']:.2f} s; {found['saves']} saves each way"
        ],
    )


def restore(found: Row) -> Found:
    share = 100 * statistics.median(found["cold"]["ratios"])
    rows = [row("restore: of the speed of reading the disk", share, RESTORE, at_least=True)]
    notes = [
        f"restore, {kind} page cache: reading {one['disk'] / 1e6:,.0f} MB/s by {one['disk_threads']}, restoring "
        f"{one['restore'] / 1e6:,.0f} MB/s, checksums beside it, {one['cpu']:.2f} CPU s"
        for kind, one in (("cold", found["cold"]), ("warm", found["warm"]))
    ]
    size = f"{found['state_bytes'] / 1e9:.2f} GB, {found['file_bytes'] / 1e9:.2f} GB in {found['files']} files"
    return Found(rows, [f"restore: {size}, fsdp 8 on simulated devices", *notes])


def start(found: Row) -> Found:
    firsts, parts = found["firsts"], found["parts"]
    said = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in parts.items() if name != "first step")
    return Found(
        [row("restart: process to first step, warm compile cache", statistics.median(firsts), START, unit=" s")],
        [
            f"restart: {said}; imports alone {found['imports']:.1f} s; {min(firsts):.1f} to {max(firsts):.1f} s in "
            f"{len(firsts)} starts; {found['cold']:.0f} s with an empty cache"
        ],
    )


PARTS = {"telemetry": telemetry, "stall": stall, "restore": restore, "start": start}


def row(what: str, value: float, goal: float, *, at_least: bool = False, unit: str = " %") -> dict[str, Any]:
    holds = value >= goal if at_least else value < goal
    bound = "at least" if at_least else "under"
    return {
        "what": what,
        "measured": f"{cell(value)}{unit}",
        "goal": f"{bound} {goal:g}{unit}",
        "holds": "yes" if holds else "no",
    }


def measure_here(part: str, rounds: int) -> Row:
    """In this process, which must not have used JAX before."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # as the product's own commands do
    if part == "telemetry":
        import runs_telemetry

        return runs_telemetry.measure(rounds)
    if part == "stall":
        import checkpoint_stall

        return checkpoint_stall.measure(rounds)
    if part == "restore":
        import runs_restore

        return runs_restore.measure(rounds)
    import runs_start

    return runs_start.measure(rounds)


def take(parts: Sequence[str], rounds: int | None) -> Found:
    """Measure each part in a process of its own."""
    rows, notes = [], []
    for part in parts:
        begun, machine = time.monotonic(), Machine()
        times = rounds or ROUNDS[part]
        try:
            flags = ["--json", "--parts", part, "--rounds", str(times)]
            found = PARTS[part](json.loads(last_line([sys.executable, __file__, *flags])[0]))
        except NotMeasured as reason:
            found = Found([], [f"{part}: not measured: {reason}"])
        rows += found.rows
        notes += [*found.notes, f"{part}: others used {machine.others()} of the CPU meanwhile"]
        print(f"{part}: done in {time.monotonic() - begun:.0f} s", file=sys.stderr, flush=True)
    return Found(rows, notes)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--rounds", type=int, help=f"of each part (default {ROUNDS})")
    parser.add_argument("--json", action="store_true", help="measure one part in this process and print what was found")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write there what is printed, too")
    options = parser.parse_args()
    if options.json:
        print(json.dumps(measure_here(options.parts[0], options.rounds or ROUNDS[options.parts[0]])))
        return 0
    machine = Machine()
    found = take(options.parts, options.rounds)
    if not found.rows:
        sys.exit("\n".join(found.notes))
    table = "\n".join(Table("What a run costs beside its steps", found.rows, found.notes).markdown())
    print(f"{table}\n{machine}")
    if options.output is not None:
        title = f"# What a run costs beside its steps, {datetime.date.today()}"
        how = "```sh\npython benchmarks/runs_cpu.py\n```\n\nAs printed."
        options.output.write_text(f"{title}\n\n{how}\n\n{table}\n{machine}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
