"""The scaling study: GShard's own table and public models, compiled for 8 to 2,048 chips of TPU v5p by the planner.

    python benchmarks/scaling.py --out study.jsonl                             # every config on every number of chips
    python benchmarks/scaling.py --out study.jsonl --write docs/scaling.md     # the same, into the page
    python benchmarks/scaling.py --configs 12l_128e olmoe_1b_7b --chips 8 128
    python benchmarks/scaling.py --quick                                       # two small cases

Needs no TPU, only its compiler (pip install 'gshardx[tpu]'). Each case is a planner in a process of its own, without a
compilation cache, so that its seconds and its memory are its own. With --out, cases that have a plan in that file are
not run again: an interrupted study goes on where it was.
"""

import argparse
import datetime
import importlib.metadata
import json
import math
import os
import platform
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # before JAX is imported

from flax import nnx
from report import Machine
from scaling_table import FAMILIES, Record, goals, table
from timing import filled

from gshardx.cli import read_config
from gshardx.config import Config
from gshardx.models.decoder import Decoder
from gshardx.sharding import MeshConfig
from gshardx.sharding.chips import CHIPS

ROOT = Path(__file__).parent.parent
SHAPES = {8: "2x2x2", 32: "2x4x4", 128: "4x4x8", 512: "8x8x8", 2048: "8x16x16"}
"""Of v5p, by the number of chips."""
STATE = 16
"""Bytes that training keeps of a parameter: itself, its gradient and AdamW's two moments, all fp32."""
FSDP_AT_MOST = 64
"""Chips that share one matrix; more of them would each hold a few rows."""
NO_FIT = 4
"""The planner's exit code for a plan that does not fit."""
FACTS = (
    "fits", "parameters", "active_parameters", "memory", "flops_per_device", "moe_layers", "lower_seconds",
    "compile_seconds", "hlo_instructions", "program_bytes", "predicted_step_seconds", "tokens_per_second", "mfu_bound",
)  # fmt: skip
"""Of the planner's JSON, what a record keeps as it is."""


class Case(NamedTuple):
    """A config, by its path inside configs/ without the suffix, on a number of chips."""

    config: str
    chips: int


@cache
def read(case: Case) -> Config:
    return read_config(ROOT / "configs" / f"{case.config}.yaml")


def command(case: Case) -> list[str]:
    """The planner's, with the config's batch a device kept (weak scaling)."""
    config = read(case)
    mesh = mesh_of(case, config)
    flags = [f"--mesh.{axis}={size}" for axis, size in mesh.shape.items()]
    batch = config.train.batch_size // config.mesh.batch_shards * mesh.batch_shards
    file = f"configs/{case.config}.yaml"
    topology = f"v5p:{SHAPES[case.chips]}"
    planner = [sys.executable, "-m", "gshardx.plan", "--config", file, "--topology", topology, "--json"]
    return [*planner, *flags, f"--train.batch_size={batch}"]


def mesh_of(case: Case, config: Config) -> MeshConfig:
    """GShard's layout for its own models, else the widest expert axis that leaves room."""
    experts = config.model.moe.num_experts
    if case.config.startswith("gshard/"):
        expert = min(experts, case.chips)
        return MeshConfig(data=case.chips // expert, expert=expert)
    in_experts, others = parameters(config)
    return widest_mesh(experts, in_experts, others, config.model.width, case.chips)


def widest_mesh(experts: int, in_experts: int, others: int, width: int, chips: int) -> MeshConfig:
    """The most chips on ``expert`` that leave half of each chip's memory to activations; the rest on fsdp, then data.

    Where parameters, gradients and moments take more than half on any mesh: where they take least.
    """
    meshes = []
    for expert in (2**i for i in range(chips.bit_length()) if experts % 2**i == 0):
        fsdp = math.gcd(chips // expert, width, FSDP_AT_MOST)
        state = STATE * (in_experts / (expert * fsdp) + others / fsdp)
        meshes.append((state, MeshConfig(data=chips // expert // fsdp, fsdp=fsdp, expert=expert)))
    roomy = [mesh for state, mesh in meshes if state <= CHIPS["v5p"].hbm_bytes / 2]
    return roomy[-1] if roomy else min(meshes, key=lambda pair: pair[0])[1]


def parameters(config: Config) -> tuple[int, int]:
    """In experts, and all others; from shapes alone."""
    model = nnx.eval_shape(lambda: Decoder(config.model, config.data.vocab_size, rngs=nnx.Rngs(0)))
    sizes = {True: 0, False: 0}
    for _, parameter in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        sizes["expert" in parameter.get_metadata()["axes"]] += math.prod(parameter.get_value().shape)
    return sizes[True], sizes[False]


def run(case: Case, limit: float) -> Record:
    """Plan one case in its own process; a record with ``plan`` None where it gave none."""
    machine, start = Machine(), time.perf_counter()
    arguments = command(case)
    code, out, err, used = measured(arguments, limit)
    seconds = time.perf_counter() - start
    plan = plan_of(out) if code in (0, NO_FIT) else None
    error = None if plan else next(iter(err.strip().splitlines()[-1:]), f"ended with code {code}, without a word")
    if code < 0:
        error = f"stopped after {seconds:.0f} s (signal {-code})"
    config, mesh = read(case), mesh_of(case, read(case))
    return {
        "config": case.config,
        "chips": case.chips,
        "layers": config.model.layers,
        "experts": config.model.moe.num_experts,
        "mesh": {axis: size for axis, size in mesh.shape.items() if size > 1},
        "command": " ".join(["python", *arguments[1:]]),
        "planner_seconds": seconds,
        "planner_cpu_seconds": used.ru_utime + used.ru_stime,
        "planner_peak_bytes": used.ru_maxrss * 1024,
        "cores": os.cpu_count(),
        "others": machine.others(),
        "versions": versions(),
        "plan": plan,
        "error": error,
    }


def measured(arguments: list[str], limit: float) -> tuple[int, str, str, resource.struct_rusage]:
    """Exit code, both outputs and what it used of the machine, of a process that ``limit`` seconds stop."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = subprocess.Popen(arguments, cwd=ROOT, stdout=out, stderr=err)
        timer = threading.Timer(limit, process.kill)
        timer.start()
        try:
            _, status, usage = os.wait4(process.pid, 0)  # its own, unlike getrusage's of all children
        finally:
            timer.cancel()
        process.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        err.seek(0)
        return process.returncode, out.read(), err.read(), usage


def plan_of(out: str) -> dict[str, Any]:
    """What a record keeps of the planner's JSON; bytes of all-to-alls are a device's, of one layer."""
    plan = json.loads(out)
    exchanged = None
    if plan["collectives"] is not None and plan["moe_layers"]:
        mine = [one for one in plan["collectives"] if one["op"] in ("all-to-all", "ragged-all-to-all")]
        exchanged = sum(one["bytes_per_device"] for one in mine) / plan["moe_layers"]
    return {name: plan[name] for name in FACTS} | {"all_to_all_bytes_per_layer": exchanged}


def versions() -> str:
    """What a case ran on, and when."""
    found = [str(datetime.date.today()), f"{os.cpu_count()} CPU cores", f"Python {platform.python_version()}"]
    for name in ("jax", "libtpu"):
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            found.append(f"no {name}")
    return ", ".join(found)


def study(cases: list[Case], out: Path | None, limit: float) -> list[Record]:
    """Records of ``cases``, those without a plan in ``out`` run now and appended to it."""
    known = {Case(record["config"], record["chips"]): record for record in load(out) if record["plan"]}
    records = []
    for number, case in enumerate(cases, 1):
        if case not in known:
            print(f"{number}/{len(cases)} {case.config} on {case.chips} chips", file=sys.stderr, flush=True)
            known[case] = run(case, limit)
            if out is not None:
                with out.open("a") as file:
                    file.write(json.dumps(known[case]) + "\n")
        records.append(known[case])
    return records


def load(out: Path | None) -> list[Record]:
    if out is None or not out.exists():
        return []
    return [json.loads(line) for line in out.read_text().splitlines()]


def lines(records: list[Record]) -> Iterator[str]:
    """Tables, goals, and what they were measured on."""
    for family in FAMILIES:
        mine = [record for record in records if record["config"].startswith(f"{family}/")]
        if mine:
            yield from table(family, mine)
    yield "### Goals"
    yield ""
    yield from (f"- {goal}" for goal in goals(records))
    yield ""
    yield "; ".join(dict.fromkeys(record["versions"] for record in records)) + "."


def chosen(args: argparse.Namespace) -> list[Case]:
    if args.quick:
        return [Case("gshard/12l_128e", 8), Case("gshard/12l_128e", 32)]
    known = configs()
    for name in args.configs or ():
        if name not in known:
            raise SystemExit(f"no config {name}; there are {', '.join(known)}")
    names = [known[name] for name in args.configs or known]
    return [Case(name, chips) for name in names for chips in sorted(args.chips)]


def configs() -> dict[str, str]:
    """Those of a case, by the name of their file, smallest first."""
    files = [file for family in FAMILIES for file in (ROOT / "configs" / family).glob("*.yaml")]
    return {file.stem: f"{file.parent.name}/{file.stem}" for file in sorted(files, key=by_size)}


def by_size(file: Path) -> tuple[int, int, int]:
    """GShard's models first, each family by layers and experts."""
    config = read_config(file)
    return list(FAMILIES).index(file.parent.name), config.model.layers, config.model.moe.num_experts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--configs", nargs="+", metavar="NAME", help="names of files in configs/gshard, configs/models")
    parser.add_argument("--chips", nargs="+", type=int, choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--quick", action="store_true", help="two small cases")
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="JSON lines, one a case; those in it are not run again"
    )
    parser.add_argument("--recorded", action="store_true", help="tell what --out FILE holds; run nothing")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="also between the markers in PAGE")
    parser.add_argument("--limit", type=float, default=1800.0, help="seconds after which a case is stopped")
    args = parser.parse_args()
    page = args.write.read_text() if args.write else None
    cases = chosen(args)
    if args.recorded:
        recorded = {Case(record["config"], record["chips"]) for record in load(args.out) if record["plan"]}
        cases = [case for case in cases if case in recorded]
    records = study(cases, args.out, args.limit)
    text = "\n".join(lines(records))
    print(text, flush=True)
    if page is not None:
        args.write.write_text(filled(page, "scaling", text))
    return int(any(record["error"] for record in records))


if __name__ == "__main__":
    sys.exit(main())
