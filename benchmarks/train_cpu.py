"""Training speed on this machine's CPU, side by side: gshardx, MaxText, Hugging Face; and checkpoint stalls.

    python benchmarks/train_cpu.py                                      # everything, interleaved: two tables
    python benchmarks/train_cpu.py --devices 8 --shapes fine --json     # gshardx alone, one JSON object
    python benchmarks/train_cpu.py --stall                              # the checkpoint table alone

Every measurement has a process of its own, since JAX fixes its devices when it starts. Seconds say as much about the
machine, and about who else uses it, as about the programs: compare ratios.
"""

import argparse
import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple

import maxtext
from commands import last_line
from report import (
    GSHARDX,
    HUGGING_FACE,
    MAXTEXT,
    Line,
    Machine,
    NotMeasured,
    Row,
    speed_goals,
    speed_table,
    stall_table,
    versions,
)
from shape import SHAPES, Shape

HERE = Path(__file__).resolve().parent
SCRIPT = HERE.parent.parent / "shared" / "bench" / "maxtext_cpu.sh"


class Contender(NamedTuple):
    """Somebody to measure; ``measure`` raises NotMeasured."""

    framework: str
    shape: str
    devices: int
    measure: Callable[[], Row]


def main() -> int:
    args = parse()
    if args.json:
        return measure_here(args)
    machine = Machine()
    rows: list[Row] = []
    if not args.stall:
        lines = take_turns(contenders(args), args.rounds)
        print("\n".join([*speed_table(lines), "", *speed_goals(lines), ""]), flush=True)
        rows += [line.rows[0] for line in lines if isinstance(line.rows, list)]
    try:
        rows.append(stall(args.saves))
        print("\n".join(stall_table(rows[-1])))
    except NotMeasured as reason:
        print(f"checkpoint stall: not measured: {reason}")
    print(f"\n{machine}\n{versions(rows)}")
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, nargs="+", default=[8, 1], metavar="N", help="simulated devices")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES), help="what to train (default all)")
    parser.add_argument("--json", action="store_true", help="measure gshardx alone and print its row")
    parser.add_argument("--stall", action="store_true", help="measure checkpoints alone")
    parser.add_argument("--steps", type=int, default=10, help="steps a measurement; the first 4 do not count")
    parser.add_argument("--rounds", type=int, default=2, help="how often each framework has its turn")
    parser.add_argument("--saves", type=int, default=5, help="checkpoints to save each way")
    parser.add_argument("--maxtext", type=Path, default=SCRIPT, metavar="SCRIPT", help="see maxtext.py")
    parser.add_argument("--hf_python", default=sys.executable, metavar="PYTHON", help="has torch and transformers")
    args = parser.parse_args()
    if args.json and not args.stall and (len(args.devices), len(args.shapes)) != (1, 1):
        parser.error("--json prints one row: give --devices N and --shapes NAME, or --stall")
    if args.steps <= 4:
        parser.error("--steps: the first 4 do not count; give 5 or more")
    return args


def measure_here(args: argparse.Namespace) -> int:
    """Measure gshardx in this process and print its row."""
    os.environ["JAX_PLATFORMS"] = "cpu"  # before JAX is imported
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # as the product's own commands do
    from gshardx.errors import BadInput

    try:
        if args.stall:
            import checkpoint_stall

            row = checkpoint_stall.measure(args.saves)
        else:
            import gshardx_train

            row = gshardx_train.measure(args.devices[0], args.steps, SHAPES[args.shapes[0]])
    except BadInput as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(row))
    return 0


def contenders(args: argparse.Namespace) -> list[Contender]:
    """Everybody on every shape, those that are compared one after the other."""
    found = []
    for shape in (SHAPES[name] for name in args.shapes):
        for devices in args.devices:
            peer = partial(maxtext.measure, args.maxtext, devices, args.steps, shape)
            found.append(Contender(GSHARDX, shape.name, devices, partial(gshardx, devices, args.steps, shape)))
            found.append(Contender(MAXTEXT, shape.name, devices, peer))
        found.append(Contender(HUGGING_FACE, shape.name, 1, partial(hugging_face, args.hf_python, args.steps, shape)))
    return found


def take_turns(everyone: list[Contender], rounds: int) -> list[Line]:
    """Measure each once a round, one after the other, so that a slow minute of the machine does not hit one alone.

    Every other round runs backwards. Who fails is not tried again.
    """
    found: dict[Contender, list[Row] | NotMeasured] = {one: [] for one in everyone}
    for number in range(rounds):
        for one in everyone if number % 2 == 0 else reversed(everyone):
            rows = found[one]
            if isinstance(rows, NotMeasured):
                continue
            try:
                machine = Machine()
                rows.append(one.measure() | {"others": machine.others()})
                result = "{tokens_per_second:,.0f} tokens/s, others used {others} of the CPU".format(**rows[-1])
            except NotMeasured as reason:
                found[one], result = reason, f"not measured: {reason}"
            name = f"{one.framework} on {one.devices}, {one.shape}"
            print(f"round {number + 1}, {name}: {result}", file=sys.stderr, flush=True)
    return [Line(one.framework, one.shape, one.devices, rows) for one, rows in found.items()]


def gshardx(devices: int, steps: int, shape: Shape) -> Row:
    flags = ["--json", "--devices", str(devices), "--shapes", shape.name, "--steps", str(steps)]
    return row_of([sys.executable, __file__, *flags])


def stall(saves: int) -> Row:
    return row_of([sys.executable, __file__, "--json", "--stall", "--saves", str(saves)])


def hugging_face(python: str, steps: int, shape: Shape) -> Row:
    probe = [python, "-c", "import torch, transformers"]
    if subprocess.run(probe, capture_output=True, check=False).returncode:
        raise NotMeasured("pip install torch transformers, there or in --hf_python PYTHON")
    # OpenMP's threads spin while they wait, and lose two thirds of their speed where others use the cores too.
    environment = {"OMP_WAIT_POLICY": "PASSIVE", **os.environ}
    command = [python, str(HERE / "hf_train.py"), "--steps", str(steps), "--shape", shape.name]
    return row_of(command, environment)


def row_of(command: list[str], environment: Mapping[str, str] | None = None) -> Row:
    line, peak = last_line(command, environment)
    row: Row = json.loads(line)
    return row | {"peak_bytes": peak}


if __name__ == "__main__":
    sys.exit(main())
