"""What uneven loads do to a layer: Zipf's law, a hot expert, a hot device, a hotspot that rotates, a burst.

    python benchmarks/imbalance.py                    # both tables, on eight simulated devices
    python benchmarks/imbalance.py --part routers     # what each router drops, and how even it gets
    python benchmarks/imbalance.py --part dispatchers # what each dispatcher takes: time and peak memory

Tokens carry the logits of the pattern in their first numbers, and the routers' kernels read just those.
"""

import argparse
import dataclasses
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # before JAX is imported

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from layers import Subject
from report import Machine
from timing import Table, goal, ratio, take_turns

from gshardx.config import ModelConfig, MoEConfig
from gshardx.layers.routing import ROUTERS
from gshardx.layers.routing.hash import hashed
from gshardx.models.moe import NEEDED, build_moe
from gshardx.sharding import MeshConfig, build_mesh, simulate_devices

DEVICES, HOT = 8, 6.0
BY_TAGS = {"task", "demix"}
"""Routers whose loads are those of the documents' tags."""
MEMORY_GOAL = 1.05
"""Peak memory under any pattern, over that of even loads."""


@dataclasses.dataclass(frozen=True)
class Sizes:
    groups: int = 8
    tokens: int = 512
    width: int = 256
    experts: int = 16
    hidden: int = 512

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.groups, self.tokens, self.experts


Batches = Iterator[np.ndarray]
"""Logits ``[g, s, e]``, a batch at a time."""


def even(draw: np.random.Generator, sizes: Sizes) -> Batches:
    yield draw.normal(size=sizes.shape)


def zipf(draw: np.random.Generator, sizes: Sizes) -> Batches:
    """Expert n is the first choice of 1 / n of what expert 1 is."""
    yield draw.gumbel(size=sizes.shape) - np.log(np.arange(1, sizes.experts + 1))


def hot_expert(draw: np.random.Generator, sizes: Sizes, hot: int = 3) -> Batches:
    yield draw.normal(size=sizes.shape) + HOT * (np.arange(sizes.experts) == hot)


def hot_device(draw: np.random.Generator, sizes: Sizes) -> Batches:
    yield draw.normal(size=sizes.shape) + HOT * (np.arange(sizes.experts) * DEVICES // sizes.experts == 1)


def rotating(draw: np.random.Generator, sizes: Sizes) -> Batches:
    for hot in range(0, sizes.experts, sizes.experts // 4):
        yield from hot_expert(draw, sizes, hot)


def burst(draw: np.random.Generator, sizes: Sizes) -> Batches:
    for _ in range(3):
        yield from even(draw, sizes)
    yield from hot_expert(draw, sizes)


PATTERNS: dict[str, Callable[[np.random.Generator, Sizes], Batches]] = {
    "even": even,
    "Zipf": zipf,
    "hot expert": hot_expert,
    "hot device": hot_device,
    "rotating hotspot": rotating,
    "burst": burst,
}
DISPATCHERS: dict[str, dict[str, Any]] = {
    "gather": {"dispatcher": "gather"},
    "einsum": {"dispatcher": "einsum"},
    "ragged": {"dispatcher": "ragged"},
    "gather, dropless": {"dispatcher": "gather", "capacity_factor": None},
    "ragged, dropless": {"dispatcher": "ragged", "capacity_factor": None},
}


def config(sizes: Sizes, **moe: Any) -> ModelConfig:
    top_k = 1 if moe.get("router") in ("switch", "base", "stable", "demix", "smear", "lory") else 2
    losses = {name: weight for router, (name, weight, _) in NEEDED.items() if router == moe.get("router")}
    options = {"num_experts": sizes.experts, "hidden": sizes.hidden, "top_k": top_k, "losses": losses, **moe}
    return ModelConfig(width=sizes.width, moe=MoEConfig(**options))


def layer(sizes: Sizes, mesh: Any, **moe: Any) -> Subject:
    """Training's forward pass, and backward on demand; the statistics are ``found.stats``."""

    def build() -> nnx.Module:
        return build_moe(config(sizes, **moe), 1.0, nnx.Rngs(0), vocab=64 * sizes.experts)  # the ids of inputs()

    def call(module: Any, x: jax.Array) -> Any:
        ids = x[..., -1].astype(jnp.int32)
        real = jnp.ones(x.shape[:2], bool)
        out, found = module(x, real, jax.random.key(0), module.router.initial_state(), ids)
        return (out, sum(found.losses.values())), found.stats

    return Subject(build, call, (sizes.groups, sizes.tokens, sizes.width), "batch time model", mesh)


def inputs(sizes: Sizes, pattern: str) -> list[np.ndarray]:
    """Tokens whose first numbers are logits and whose last one is an id that a plain hash sends to the best expert."""
    draw = np.random.default_rng(0)
    experts = np.asarray(hashed(np.arange(64 * sizes.experts, dtype=np.int32), 0)) % sizes.experts
    ids = np.array([np.flatnonzero(experts == expert)[0] for expert in range(sizes.experts)])
    batches = []
    for logits in PATTERNS[pattern](draw, sizes):
        x = 0.1 * draw.normal(size=(*logits.shape[:2], sizes.width))
        x[..., : sizes.experts], x[..., -1] = logits, ids[logits.argmax(-1)]
        batches.append(x.astype(np.float32))
    return batches


def reading_logits(params: Any) -> Any:
    """The parameters with a router's kernel that reads a token's first numbers as they are."""
    if "router" in params:  # hash has none
        kernel = params["router"]["kernel"]
        value = kernel.get_value()
        kernel.set_value(jax.device_put(jnp.eye(*value.shape, dtype=value.dtype), value.sharding))
    return params


def routers(args: argparse.Namespace) -> Table:
    """What each drops in training, and how uneven its choices are before any is dropped."""
    sizes, mesh, rows = sized(args), build_mesh(MeshConfig()), []
    for name in args.routers:
        subject = layer(sizes, mesh, router=name)
        step, params = subject.compiled(backward=False), reading_logits(subject.values[0])
        row: dict[str, Any] = {"router": name}
        for pattern in PATTERNS:
            found = [step(params, jnp.asarray(x))[1] for x in inputs(sizes, pattern)]
            drops = np.mean([float(one.drop_fraction) for one in found])
            row[pattern] = f"{drops:.0%}, {np.mean([float(one.load_max_over_mean) for one in found]):.1f}"
        rows.append(row)
    title = f"Routers, capacity 1.25, {sizes}: choices dropped, and load max / mean"
    return Table(title, rows, ["columns of cosine's kernel are no logits, so that its loads differ from the pattern's"])


def dispatcher(args: argparse.Namespace) -> Table:
    """One dispatcher under every pattern, in a process of its own, whose peak memory is then the dispatcher's."""
    sizes, mesh = sized(args), build_mesh(MeshConfig(expert=DEVICES))
    subject = layer(sizes, mesh, router="top_k", **DISPATCHERS[args.dispatcher])
    step, (params, _, cotangent) = subject.compiled(backward=True), subject.values
    params = reading_logits(params)
    place = cotangent.sharding
    batches = {pattern: [jax.device_put(x, place) for x in inputs(sizes, pattern)] for pattern in PATTERNS}

    def action(pattern: str) -> Callable[[], Any]:
        return lambda: [jax.block_until_ready(step(params, x, cotangent)) for x in batches[pattern]][-1]

    for _ in range(3):
        action("even")()
    usual, peaks = _peak_bytes(), {}
    for pattern in PATTERNS:
        for _ in range(3):
            action(pattern)()
        peaks[pattern] = _peak_bytes()
    seconds = take_turns({pattern: action(pattern) for pattern in PATTERNS}, args.rounds)
    rows = []
    for pattern, xs in batches.items():
        drops = np.mean([float(step(params, x, cotangent)[2].drop_fraction) for x in xs])
        rows.append(
            {
                "dispatcher": args.dispatcher,
                "pattern": pattern,
                "dropped %": 100 * drops,
                "time x": ratio(seconds, pattern, "even") / len(xs),
                "peak memory x": peaks[pattern] / usual,
                "reserved MB a device": step.memory.peak / 1e6,
            }
        )
    note = goal("peak memory of any pattern over even loads", max(row["peak memory x"] for row in rows), MEMORY_GOAL)
    title = f"{args.dispatcher}, {DEVICES} simulated devices, top_k of {sizes.experts} experts, forward and backward"
    return Table(f"{title}; x: over even loads, a batch", rows, [note])


def _peak_bytes() -> int:
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def sized(args: argparse.Namespace) -> Sizes:
    return Sizes(tokens=32, width=32, hidden=16) if args.small else Sizes()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=["all", "routers", "dispatchers", "dispatcher"], default="all")
    parser.add_argument("--dispatcher", choices=list(DISPATCHERS), default="gather", help="of --part dispatcher")
    names = [name for name in ROUTERS if name not in BY_TAGS]
    parser.add_argument("--routers", nargs="+", choices=names, default=names, help="of --part routers")
    parser.add_argument("--rounds", type=int, default=5, help="how often each pattern has its turn")
    parser.add_argument(
        "--small", action="store_true", help="tiny shapes: checks that the script runs, measures nothing"
    )
    args = parser.parse_args()
    again = [sys.executable, __file__, *sys.argv[1:]]
    if args.part == "all":
        return max(
            subprocess.run([*again, "--part", part], check=False).returncode for part in ("routers", "dispatchers")
        )
    if args.part == "dispatchers":
        each = [[*again, "--part", "dispatcher", "--dispatcher", name] for name in DISPATCHERS]
        return max(subprocess.run(command, check=False).returncode for command in each)
    simulate_devices(DEVICES if args.part == "dispatcher" else 1)
    machine = Machine()
    table = {"routers": routers, "dispatcher": dispatcher}[args.part](args)
    notes = (
        ["small shapes: checks that the script runs, measures nothing"] if args.small else [*table.notes, str(machine)]
    )
    print("\n".join(table._replace(notes=notes).markdown()), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
