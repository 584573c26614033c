"""What every step of the quickstart's model sends on every mesh of 8 devices, and what its budget allows.

Compiles for simulated CPU devices; nothing is run. The tables of docs/collectives.md come from here:

    python benchmarks/collectives.py --write docs/collectives.md
"""

import argparse
import dataclasses
import itertools
import math
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

os.environ.setdefault("JAX_PLATFORMS", "cpu")
from timing import filled

from gshardx.cli import read_config
from gshardx.config import Config, check_model_on_mesh
from gshardx.errors import BadInput
from gshardx.models.budget import Step, step_budget
from gshardx.models.generator import compile_decode, compile_prefill
from gshardx.sharding import Allowance, Budget, Collective, CompiledStep, MeshConfig, simulate_devices, totals
from gshardx.sharding.collectives import REDUCTIONS
from gshardx.train.job import Job

CONFIG = Path(__file__).parent.parent / "configs" / "quickstart.yaml"
DEVICES, ROWS, LENGTH, CHUNK = 8, 16, 128, 64
"""Rows and cache length of prefill and decode, and prompt tokens in a call of prefill."""
STEPS: tuple[Step, ...] = get_args(Step)
HEADER = "| mesh | op | over | count | bytes a device | budget: count | bytes |\n|---|---|---|---|---|---|---|"


def meshes(config: Config) -> Iterator[MeshConfig]:
    """All products over the devices that the model and its batches divide over."""
    for sizes in itertools.product(range(1, DEVICES + 1), repeat=4):
        mesh = MeshConfig(*sizes)
        if mesh.size == DEVICES and ROWS % mesh.batch_shards == 0 and config.train.batch_size % mesh.batch_shards == 0:
            try:
                check_model_on_mesh(config.model, mesh)
            except BadInput:
                continue
            yield mesh


def compiled(config: Config, step: Step) -> tuple[CompiledStep[..., Any], Budget]:
    """``step`` of ``config`` on its mesh, and its budget."""
    job = Job.of(config, config.data.vocab_size)
    plan, mesh, rows = job.blueprint, job.mesh, ROWS
    program: CompiledStep[..., Any]
    if step == "prefill":
        program, tokens = compile_prefill(plan, mesh, length=LENGTH, rows=rows, chunk=CHUNK), CHUNK
    elif step == "decode":
        program, tokens = compile_decode(plan, mesh, length=LENGTH, rows=rows), 1
    else:
        program = job.train_step if step == "train" else job.eval_step
        rows, tokens = config.train.batch_size, config.data.sequence_length
    return program, step_budget(plan, mesh, step, rows=rows, tokens=tokens, split=job.split)


def lines(mesh: MeshConfig, found: list[Collective], budget: Budget) -> Iterator[str]:
    """A row of the table for each operation and axes, and one for all reductions across each axis."""
    name = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items() if size > 1)
    allowed = {(one.op, one.axes): one for one in budget.allowances}
    for one in totals(found):
        sent = f"{one.op} | {' x '.join(one.axes)} | {one.count} | {one.bytes_per_device:,}"
        yield f"| {name} | {sent} | {' | '.join(told(allowed.get((one.op, one.axes)), one.op, budget.small))} |"
        name = ""
    for axis, most in budget.reduced.items():
        crossing = [one for one in found if axis in one.axes and one.op in REDUCTIONS]
        count, sent = sum(one.count for one in crossing), sum(one.bytes_per_device for one in crossing)
        yield f"| | reductions | any with {axis} | {count} | {sent:,} | any | up to {most:,} |"
    if not found:
        yield f"| {name} | nothing | | | | | |"


def told(allowance: Allowance | None, op: str, small: int) -> tuple[str, str]:
    """Count and bytes that the budget allows."""
    if allowance is None:
        return "small", f"up to {small:,} together" if op == "all-reduce" else "none"
    most = "" if allowance.least_bytes == allowance.bytes_per_device else "up to "
    count = "any" if allowance.count is None else f"{most}{allowance.count}"
    return count, "below" if allowance.bytes_per_device is None else f"{most}{allowance.bytes_per_device:,}"


def tables(config: Config, wanted: list[MeshConfig], steps: list[Step]) -> Iterator[str]:
    """Markdown, a table a step.

    Raises:
        SystemExit: a step breaks its budget.
    """
    model, data, moe = config.model, config.data, config.model.moe
    yield (
        f"{CONFIG.stem}: {model.layers} layers of width {model.width}, {model.layers // moe.every} of them with "
        f"{moe.num_experts} experts, top-{moe.top_k}, capacity {moe.capacity_factor}; train and forward "
        f"{config.train.batch_size} x {data.sequence_length} tokens, prefill {ROWS} x {CHUNK}, decode {ROWS} x 1; "
        f"{model.dtype}."
    )
    for step in steps:
        yield f"\n### {step}\n\n{HEADER}"
        for mesh in wanted:
            program, budget = compiled(dataclasses.replace(config, mesh=mesh), step)
            print(f"{step} on {mesh}", file=sys.stderr)
            if breaches := budget.breaches(program.collectives):
                raise SystemExit("\n".join([f"{step} on {mesh} breaks its budget:", *breaches]))
            yield from lines(mesh, program.collectives, budget)


def mesh_of(text: str) -> MeshConfig:
    """``expert=4,data=2``"""
    return MeshConfig(**{axis: int(size) for axis, size in re.findall(r"(\w+)=(\d+)", text)})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mesh", nargs="+", type=mesh_of, help="for example expert=4,data=2; default: all that fit")
    parser.add_argument("--step", nargs="+", choices=STEPS, default=list(STEPS))
    parser.add_argument("--write", type=Path, help="put the tables between the marks of this file")
    arguments = parser.parse_args()
    config = read_config(CONFIG)
    simulate_devices(DEVICES)
    wanted = arguments.mesh or list(meshes(config))
    assert all(math.prod(mesh.shape.values()) == DEVICES for mesh in wanted), f"meshes have {DEVICES} devices here"
    text = "\n".join(tables(config, wanted, arguments.step))
    if arguments.write is None:
        print(text)
        return
    arguments.write.write_text(filled(arguments.write.read_text(), "collectives", text))


if __name__ == "__main__":
    main()
