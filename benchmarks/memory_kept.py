"""What it saves on a CPU that a run keeps the memory of its last step: each shape with and without, taking turns.

python benchmarks/memory_kept.py [--shapes coarse mixtral fine] [--devices 1] [--rounds 3] [--steps 8]
"""

import argparse
import os
import statistics
import sys

from report import Machine, Row
from shape import SHAPES, Shape
from train_cpu import HERE, row_of

LEFT_ALONE = {"MALLOC_PERTURB_": "0"}  # changes nothing; since the user speaks to glibc's malloc, gshardx does not


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--devices", type=int, nargs="+", default=[1], metavar="N")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8)
    args = parser.parse_args()
    machine = Machine()
    print("| shape | devices | times as fast (range) | page faults a step, without | with | peak MB, without | with |")
    print("|---|---|---|---|---|---|---|")
    for shape in (SHAPES[name] for name in args.shapes):
        for devices in args.devices:
            pairs = [
                tuple(row(shape, devices, args.steps, environment) for environment in (LEFT_ALONE, {}))
                for _ in range(args.rounds)
            ]
            print(line(shape, devices, pairs), flush=True)
    print(f"\n{machine}")
    return 0


def row(shape: Shape, devices: int, steps: int, environment: dict[str, str]) -> Row:
    flags = ["--json", "--devices", str(devices), "--shapes", shape.name, "--steps", str(steps)]
    return row_of([sys.executable, str(HERE / "train_cpu.py"), *flags], os.environ | environment)


def line(shape: Shape, devices: int, pairs: list[tuple[Row, ...]]) -> str:
    """Of rows without and with, a pair a round."""
    times = [without["median_step_seconds"] / kept["median_step_seconds"] for without, kept in pairs]
    faults, peaks = (
        [statistics.median(pair[side][name] for pair in pairs) for side in (0, 1)]
        for name in ("page_faults", "peak_bytes")
    )
    return (
        f"| {shape.name} | {devices} | {statistics.median(times):.2f} ({min(times):.2f} to {max(times):.2f}) "
        f"| {faults[0]:,.0f} | {faults[1]:,.0f} | {peaks[0] / 1e6:,.0f} | {peaks[1] / 1e6:,.0f} |"
    )


if __name__ == "__main__":
    sys.exit(main())
