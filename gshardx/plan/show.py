"""A plan as text for a terminal."""

import sys
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from gshardx.config import Config
from gshardx.plan.memory import KINDS
from gshardx.plan.program import Compiled
from gshardx.plan.report import Plan
from gshardx.plan.roofline import collective_seconds
from gshardx.plan.topology import Topology
from gshardx.sharding import CompiledStep, describe, totals

_GIB = 2**30
_FILE_WIDTH = 140  # columns where nobody's window says


def show(plan: Plan, config: Config, topology: Topology, compiled: Compiled, remarks: Sequence[str]) -> None:
    """Print everything, ``remarks`` last."""
    console = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else _FILE_WIDTH)
    console.print(
        f"{plan.step} step on {plan.topology}: {plan.chips} {plan.chip} chip(s), mesh {config.mesh}\n"
        f"{plan.parameters:,} parameters, {plan.active_parameters:,} of them met by a token, {plan.moe_layers} MoE "
        "layer(s)"
    )
    console.print(describe(compiled.inputs.parameters))
    console.print(_memory(plan))
    if isinstance(compiled.step, CompiledStep):
        _show_compiled(console, plan, topology, compiled.step)
    for warning in plan.warnings:
        console.print(f"warning: the compiler says: {warning}", markup=False)
    for line in remarks:
        console.print(line, markup=False)


def _show_compiled(console: Console, plan: Plan, topology: Topology, step: CompiledStep[..., object]) -> None:
    line = plan.roofline
    assert line is not None
    table = Table("collective", "axes", "count", "MiB a device", "ms", title="sent in a step", title_justify="left")
    for one in totals(step.collectives):
        seconds = collective_seconds(one, step.mesh, topology.chip, topology.torus)
        cells = (f"{one.count:,}", f"{one.bytes_per_device / 2**20:,.3f}", f"{seconds * 1e3:,.3f}")
        table.add_row(one.op, "*".join(one.axes), *cells)
    console.print(table)
    console.print(
        f"time      {line.step * 1e3:,.3f} ms a step = {line.device * 1e3:,.3f} on the device "
        f"(products alone {line.compute * 1e3:,.3f}, memory alone {line.memory * 1e3:,.3f}) "
        f"+ {line.interconnect * 1e3:,.3f} sending, if nothing overlaps; bound by {line.bound}\n"
        f"speed     {plan.tokens_per_second:,.0f} tokens/s, MFU at most {plan.mfu_bound:.1%}, "
        f"{plan.flops_per_device or 0:.4g} FLOPs a device\n"
        f"compiled  {plan.lower_seconds:.1f} s to lower, {plan.compile_seconds:.1f} s to compile, "
        f"{plan.hlo_instructions:,} HLO instructions"
    )


def _memory(plan: Plan) -> Table:
    peak = plan.memory["peak"] or 0
    verdict = "fits" if plan.fits else "DOES NOT FIT"
    unit, bytes_ = ("GiB", _GIB) if peak >= _GIB else ("MiB", 2**20)
    title = f"memory of a device: {verdict}, {peak / bytes_:,.2f} {unit} of {plan.hbm_bytes / _GIB:,.2f} GiB"
    table = Table("kind", unit, "share", title=title, title_justify="left")
    for kind in KINDS:
        size = plan.memory[kind]
        if size:
            table.add_row(kind, f"{size / bytes_:,.3f}", f"{size / max(peak, 1):.0%}")
    return table
