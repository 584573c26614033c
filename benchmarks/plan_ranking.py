"""How well the planner ranks: its formulas and its compiled predictions against real steps on 8 simulated devices.

    python benchmarks/plan_ranking.py                            # 12 ways to train one small model; some minutes
    python benchmarks/plan_ranking.py --write docs/planner.md    # the same, into the page
    python benchmarks/plan_ranking.py --quick                    # three of them
    python benchmarks/plan_ranking.py --chips --write docs/planner.md    # only the table of chips; measures nothing

Each way is a mesh and a rematerialisation of the same model and batch. Seconds are medians of steps taken in turns, one
program at a time. A machine that does other things meanwhile says nothing about the ranking; look at "others".
"""

import argparse
import dataclasses
import math
import os
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # before JAX is imported

import jax
import numpy as np
from report import Machine
from timing import Table, cell, filled, take_turns

from gshardx.config import Config, DataConfig, ModelConfig, MoEConfig, TrainConfig
from gshardx.plan.estimate import estimate
from gshardx.plan.roofline import roofline
from gshardx.plan.topology import Topology, open_topology, prepare
from gshardx.sharding import MeshConfig, build_mesh
from gshardx.sharding.chips import CHIPS, FIGURES
from gshardx.train.job import Job

DEVICES = 8
VOCAB, LENGTH, ROWS = 1024, 128, 16
WAYS = (
    (MeshConfig(expert=8), "none"),
    (MeshConfig(data=8), "none"),
    (MeshConfig(fsdp=8), "none"),
    (MeshConfig(data=2, expert=4), "none"),
    (MeshConfig(fsdp=2, expert=4), "none"),
    (MeshConfig(data=2, fsdp=2, expert=2), "none"),
    (MeshConfig(data=4, tensor=2), "none"),
    (MeshConfig(fsdp=2, expert=2, tensor=2), "none"),
    (MeshConfig(expert=8), "keep_all_to_all"),
    (MeshConfig(expert=8), "full"),
    (MeshConfig(data=8), "full"),
    (MeshConfig(fsdp=8), "full"),
)
QUICK = WAYS[:3]


class Way(NamedTuple):
    """Seconds of a step, by each account."""

    name: str
    estimated: float
    compiled: float
    measured: float


def config(mesh: MeshConfig, remat: str) -> Config:
    """The model of every way: 4 layers of width 128, two of them with 8 experts."""
    return Config(
        model=ModelConfig(remat=remat, moe=MoEConfig(dispatcher="gather")),  # type: ignore[arg-type]
        mesh=mesh,
        data=DataConfig(vocab_size=VOCAB, sequence_length=LENGTH),
        train=TrainConfig(batch_size=ROWS),
    )


def compare(ways: Sequence[tuple[MeshConfig, str]], topology: Topology, rounds: int) -> list[Way]:
    """Predict and compile each way, then step all of them in turns."""
    estimated, compiled, actions = {}, {}, {}
    for number, (shape, remat) in enumerate(ways, 1):
        wide = ", ".join(f"{axis} {size}" for axis, size in shape.shape.items() if size > 1)
        name = f"{wide}; {remat}"
        print(f"{number}/{len(ways)} {name}", file=sys.stderr, flush=True)
        chosen, mesh = config(shape, remat), build_mesh(shape, topology.devices)
        job = Job.of(chosen, VOCAB, mesh)
        step = job.train_step
        estimated[name] = estimate(chosen, topology).step_seconds
        compiled[name] = roofline(step.program, step.collectives, mesh, topology.chip, topology.torus).step
        actions[name] = stepping(job)
    seconds = take_turns(actions, rounds)
    return [Way(name, estimated[name], compiled[name], statistics.median(seconds[name])) for name in actions]


def stepping(job: Job) -> Callable[[], Any]:
    """Takes one train step on the same batch at each call, and waits for it."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, VOCAB, (ROWS, LENGTH + 1), dtype=np.int32)
    batch = job.to_device(
        {
            "tokens": tokens[:, :-1],
            "targets": tokens[:, 1:],
            "segments": np.ones((ROWS, LENGTH), np.int32),
            "positions": np.tile(np.arange(LENGTH, dtype=np.int32), (ROWS, 1)),
            "weights": np.ones((ROWS, LENGTH), np.float32),
        }
    )
    state = job.init_state()

    def step() -> Any:
        nonlocal state
        state, _ = jax.block_until_ready(job.train_step(state, batch))
        return state.step

    return step


def ranks(values: Sequence[float]) -> list[float]:
    """The place of each value in ascending order, 1 first; equal ones share the mean of their places."""
    return [
        sum(other < value for other in values) + (1 + sum(other == value for other in values)) / 2 for value in values
    ]


def spearman(left: Sequence[float], right: Sequence[float]) -> float:
    """Correlation of ranks: 1.0 for the same order, -1.0 for the reverse."""
    pairs = list(zip(ranks(left), ranks(right), strict=True))
    middle = (len(pairs) + 1) / 2
    shared = sum((a - middle) * (b - middle) for a, b in pairs)
    spreads = [sum((pair[side] - middle) ** 2 for pair in pairs) for side in (0, 1)]
    return shared / math.sqrt(spreads[0] * spreads[1])


def lines(ways: Sequence[Way], chip: Mapping[str, float], machine: Machine) -> Iterator[str]:
    """The table, fastest first, and what the rankings are worth."""
    ordered = sorted(ways, key=lambda way: way.measured)
    places = {account: ranks([getattr(way, account) for way in ordered]) for account in ("estimated", "compiled")}
    rows = [
        {
            "mesh; remat": way.name,
            "measured ms": 1e3 * way.measured,
            "formulas ms": 1e3 * way.estimated,
            "compiled ms": 1e3 * way.compiled,
            "place by formulas": f"{places['estimated'][at]:g}",
            "place by compiling": f"{places['compiled'][at]:g}",
        }
        for at, way in enumerate(ordered)
    ]
    rates = ", ".join(f"{name} {cell(value)}" for name, value in chip.items())
    notes = [
        *(verdict(account, ordered) for account in ("estimated", "compiled")),
        f"This machine as {DEVICES} devices: {rates}",
    ]
    yield from Table(f"{len(ways)} ways to train one model on {DEVICES} simulated devices", rows, notes).markdown()
    yield f"{machine}."


def verdict(account: str, ordered: Sequence[Way]) -> str:
    """How one account ranks the ways, which come fastest first."""
    predicted = [getattr(way, account) for way in ordered]
    measured = [way.measured for way in ordered]
    chosen = ordered[predicted.index(min(predicted))]
    name = {"estimated": "Formulas", "compiled": "Compiled programs"}[account]
    return (
        f"{name}: rank correlation (Spearman) with the measured seconds {spearman(predicted, measured):.2f}; the way "
        f"that is fastest in truth is number {ranks(predicted)[0]:g} of {len(ordered)}; the one that they put first "
        f"({chosen.name}) takes {chosen.measured / measured[0]:.2f} times as long as the fastest"
    )


def chips() -> Iterator[str]:
    """The planner's table of chips, and where each figure is from."""
    yield "| chip | TFLOP/s | memory GiB | memory GB/s | link GB/s | links | network Gbit/s |"
    yield "|---|---|---|---|---|---|---|"
    for chip in CHIPS.values():
        figures = (
            chip.peak_flops / 1e12,
            chip.hbm_bytes / 2**30,
            chip.hbm_bandwidth / 1e9,
            chip.ici_bandwidth / 1e9,
            chip.ici_links,
            chip.dcn_bandwidth * 8 / 1e9,
        )
        yield f"| {chip.name} | {' | '.join(f'{figure:,.6g}' for figure in figures)} |"
    yield ""
    yield "| chip | figure | source |"
    yield "|---|---|---|"
    for chip in CHIPS.values():
        for figure in FIGURES:
            yield f"| {chip.name} | {figure} | {chip.sources[figure]} |"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="three ways, two rounds")
    parser.add_argument("--rounds", type=int, default=7, metavar="N", help="steps of each way (default 7)")
    parser.add_argument("--chips", action="store_true", help="print the table of chips and measure nothing")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="also between the markers in PAGE")
    args = parser.parse_args()
    if args.chips:
        name, text = "chips", "\n".join(chips())
    else:
        machine = Machine()
        prepare(f"cpu:{DEVICES}")
        topology = open_topology(f"cpu:{DEVICES}")
        figures = dataclasses.asdict(dataclasses.replace(topology.chip, sources={}))
        rates = {
            "GFLOP/s": figures["peak_flops"] / 1e9,
            "memory GB/s": figures["hbm_bandwidth"] / 1e9,
            "exchange GB/s": figures["ici_bandwidth"] / 1e9,
            "ms a collective": 1e3 * figures["hop_seconds"],
        }
        ways = compare(QUICK if args.quick else WAYS, topology, 2 if args.quick else args.rounds)
        name, text = "ranking", "\n".join(lines(ways, rates, machine))
    print(text, flush=True)
    if args.write:
        args.write.write_text(filled(args.write.read_text(), name, text))
    return 0


if __name__ == "__main__":
    sys.exit(main())
