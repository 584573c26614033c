"""Every router trained at equal active FLOPs, and a dense model beside them.

    python benchmarks/routers.py --record FILE --data english.parquet                     # one seed of each
    python benchmarks/routers.py --record FILE --data english.parquet --seeds 3 --routers gshard top_k
    python benchmarks/routers.py --record FILE --speed                                    # train steps in turns
    python benchmarks/routers.py --record FILE --write docs/routers.md                    # table and plot

The quickstart's shape on one CPU device. A run that is in the record is not made again, so the table may grow over
days: losses do not depend on what else the machine does. Speeds do, and are all taken in turns in one process.
"""

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # before JAX is imported

import jax
import numpy as np
from timing import Table, filled, ratio, take_turns

from gshardx.cli import parse_config
from gshardx.layers.routing import ROUTERS
from gshardx.train.job import Job
from gshardx.train.objective import Batch

CONFIG = Path(__file__).resolve().parent.parent / "configs" / "quickstart.yaml"
HIDDEN, TOP_K = 256, 2
"""Of the quickstart's experts; a router that takes one expert, or merges some into one, gets them twice
as wide."""
WITHIN = 1.03
"""A router whose loss is further than this from gshard's has the reason on its page."""
DENSE = {
    "num_experts": 1,
    "top_k": 1,
    "hidden": HIDDEN * TOP_K,
    "router": "top_k",
    "capacity_factor": "null",
    "losses": "{balance: 0.0}",
}
BY_TAGS = {"task", "demix"}
"""Routers for texts with tags, which plain English has not."""
LAST = 50
"""Steps that statistics are means of."""
VOCAB = 2048
WIDE = {"top_k": 1, "hidden": HIDDEN * TOP_K}
UNWEIGHED = {"losses": "{balance: 0.0}"}
OPTIONS: dict[str, dict[str, Any]] = {
    "switch": WIDE,
    "base": WIDE | UNWEIGHED,
    "sinkhorn": UNWEIGHED,
    "hash": UNWEIGHED,
    "quantile": UNWEIGHED,
    "noisy_top_k": {"losses": "{importance: 0.1, load: 0.1}"},
    "expert_choice": UNWEIGHED | {"capacity_factor": 1.0},
    "adamoe": {"top_k": 3, "router_options": "{null_experts: 4}"},  # of three choices one is null, with even loads
    "relu": {"losses": "{sparsity: 1.0}"},
    "smoe_dropout": UNWEIGHED | {"router_options": "{steps: 800}"},
    "ds_moe": {"losses": "{mutual_information: 0.1}"},
    "dselect_k": {"losses": "{selector_entropy: 0.001, selector_reach: 1.0}"},
    "dynmoe": {"losses": "{balance: 0.01, diversity: 0.01}"},
    "moe_pp": {"top_k": 3},  # with even loads one of three choices is local, about
    "smear": WIDE | UNWEIGHED,
    "lory": WIDE | UNWEIGHED | {"router_options": "{segment: 32}"},  # a quarter of a row, where the paper has 16 in one
    "meo": {"hidden": HIDDEN * TOP_K, "losses": "{importance: 0.01, load: 0.01}"},
    "sentence": {"capacity_factor": "null"},
    "soft_moe": UNWEIGHED | {"router_options": "{slots: 32}"},  # as many as choices of 128 tokens
    "stable": WIDE | {"router_options": "{steps: 80}", "losses": "{balance: 0.3, distillation: 0.3}"},
}
"""Of ``model.moe``; what is not there is the quickstart's."""

Row = dict[str, Any]


def options(name: str) -> Row:
    return DENSE if name == "dense" else {"router": name, **OPTIONS.get(name, {})}


def flags_of(name: str, **others: Any) -> list[str]:
    flags = {f"model.moe.{option}": value for option, value in options(name).items()} | others
    return [word for flag, value in flags.items() for word in (f"--{flag}", str(value))]


def trained(name: str, seed: int, args: argparse.Namespace) -> Row:
    """One run's figures.

    Raises:
        SystemExit: it failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        where = {"run_dir": run, "seed": seed, "data.path": args.data, "mesh.expert": 1, "train.steps": args.steps}
        often = {"checkpoint.every": args.steps, "train.eval_every": args.steps}
        command("gshardx.train", flags_of(name, **where, **often))
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "learning/loss" in line][-LAST:]
    last = next(line for line in reversed(lines) if "evaluation/loss" in line)
    return {
        "router": name,
        "seed": seed,
        "steps": args.steps,
        "loss": last["evaluation/loss"],
        "bits_per_byte": last["evaluation/bits_per_byte"],
        **{figure: mean(steps, f"moe/{figure}") for figure in ("load_max_over_mean", "drop_fraction", "entropy")},
    }


def mean(lines: list[Row], name: str) -> float:
    return statistics.fmean(line[name] for line in lines)


def exchanged(name: str) -> float:
    """Bytes that a device's all-to-alls move in a step on the quickstart's mesh of 8."""
    mesh = {"mesh.expert": 1, "mesh.data": 8} if name == "dense" else {}
    found = json.loads(command("gshardx.plan", [*flags_of(name, **mesh, topology="cpu:8"), "--json"]))
    return sum(one["count"] * one["bytes_per_device"] for one in found["collectives"] if one["op"] == "all-to-all")


def command(module: str, flags: list[str]) -> str:
    words = [sys.executable, "-m", module, "--config", str(CONFIG), *flags]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(words)}\n{done.stderr.strip().splitlines()[-1]}")
    return done.stdout


def speeds(names: list[str], rounds: int, at_once: int = 6) -> dict[str, float]:
    """Train steps of each a second, over gshard's; some at a time in turns, as each compiled step takes memory."""
    found: dict[str, float] = {}
    for first in range(0, len(names), at_once):
        some = dict.fromkeys(["gshard", *names[first : first + at_once]])
        seconds = take_turns({name: stepper(name) for name in some}, rounds)
        found |= {name: ratio(seconds, "gshard", name) for name in some}
        jax.clear_caches()
        gc.collect()
    return found


def stepper(name: str) -> Callable[[], Any]:
    """A train step on one batch; the loss comes back."""
    config, _ = parse_config("routers", "", ["--config", str(CONFIG), *flags_of(name, **{"mesh.expert": 1})])
    job = Job.of(config, VOCAB)
    step, state = job.train_step, job.init_state()
    shape = job.batch.tokens.shape
    tokens, targets = np.random.default_rng(0).integers(0, VOCAB, (2, *shape), dtype=np.int32)
    places = np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape)
    rows = Batch(tokens, targets, np.ones(shape, np.int32), places, np.ones(shape, np.float32))
    batch = jax.device_put(rows, jax.tree.map(lambda a: a.sharding, job.batch))

    def run() -> Any:
        nonlocal state
        state, metrics = step(state, batch)
        return metrics.loss

    return run


def table(rows: list[Row], speed: dict[str, float]) -> Table:
    """Means over seeds, best first; losses over those of gshard with the same seeds."""
    reference = {row["seed"]: row for row in rows if row["router"] == "gshard"}
    made = []
    for name in dict.fromkeys(row["router"] for row in rows):
        own = [row for row in rows if row["router"] == name and row["seed"] in reference]
        losses = [row["loss"] for row in own]
        made.append(
            {
                "router": name,
                "loss": f"{statistics.fmean(losses):.3f}",
                "x gshard's": statistics.fmean(row["loss"] / reference[row["seed"]]["loss"] for row in own),
                "seeds": len(own),
                "spread": f"{max(losses) - min(losses):.3f}" if len(own) > 1 else None,
                "bits per byte": mean(own, "bits_per_byte"),
                "load max / mean": mean(own, "load_max_over_mean"),
                "dropped %": 100 * mean(own, "drop_fraction"),
                "entropy": mean(own, "entropy"),
                "tokens/s x gshard's": speed.get(name),
                "all-to-all MB": own[0]["all_to_all_bytes"] / 1e6,
            }
        )
    made.sort(key=lambda row: row["x gshard's"])
    far = ", ".join(row["router"] for row in made if row["x gshard's"] > WITHIN) or "none"
    return Table(f"{rows[0]['steps']} steps", made, [f"further than 3 % above gshard's loss: {far}"])


def plot(rows: list[Row], speed: dict[str, float], path: Path) -> None:
    """Losses of every seed and speeds, a line a router, best first; needs matplotlib (the ``plan`` extra)."""
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams["svg.hashsalt"] = "gshardx"  # the same file from the same record
    from matplotlib import pyplot as plt

    losses = {row["router"]: [one["loss"] for one in rows if one["router"] == row["router"]] for row in rows}
    names = sorted(losses, key=lambda name: -statistics.fmean(losses[name]))
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 0.28 * len(names) + 1.2), sharey=True, width_ratios=[2, 1])
    for place, name in enumerate(names):
        colour = {"gshard": "C3", "dense": "black"}.get(name, "C0")
        left.plot(losses[name], [place] * len(losses[name]), "o", color=colour, markersize=5, alpha=0.7)
        if name in speed:
            right.barh(place, speed[name], color=colour, height=0.6)
    bound = statistics.fmean(losses["gshard"])
    left.axvspan(bound, bound * WITHIN, color="C3", alpha=0.1, label="within 3 % above gshard")
    left.set(yticks=range(len(names)), yticklabels=names, xlabel="loss on held-out text, nats a token; a dot a seed")
    left.legend(loc="lower right", fontsize="small")
    left.grid(axis="y", alpha=0.3)
    right.axvline(1.0, color="C3", linewidth=1)
    right.set(xlabel="training tokens/s over gshard's")
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def missing(args: argparse.Namespace, rows: list[Row]) -> Iterator[tuple[str, int]]:
    there = {(row["router"], row["seed"]) for row in rows if row["steps"] == args.steps}
    for seed in range(args.seeds):
        for name in dict.fromkeys(["gshard", *args.routers]):
            if (name, seed) not in there:
                yield name, seed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = ["dense", *(name for name in ROUTERS if name not in BY_TAGS)]
    parser.add_argument("--data", type=Path, help="text to train on")
    parser.add_argument("--record", type=Path, required=True, help="a JSON object a run; grows")
    parser.add_argument("--routers", nargs="+", choices=names, default=names)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--speed", action="store_true", help="time train steps of each in turns")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--write", type=Path, metavar="PAGE", help="table between the page's markers, plot beside it")
    args = parser.parse_args()
    lines = [json.loads(line) for line in args.record.read_text().splitlines()] if args.record.exists() else []
    rows = [line for line in lines if "loss" in line]
    speed = {name: value for line in lines if "speed" in line for name, value in line["speed"].items()}
    for name, seed in missing(args, rows) if args.data else ():
        rows.append(trained(name, seed, args) | {"all_to_all_bytes": exchanged(name)})
        keep(args.record, rows[-1])
        print(f"{name}, seed {seed}: loss {rows[-1]['loss']:.3f}", file=sys.stderr, flush=True)
    if args.speed:
        speed |= speeds(args.routers, args.rounds)
        keep(args.record, {"speed": speed})
    rows = [row for row in rows if row["steps"] == args.steps]
    if not any(row["router"] == "gshard" for row in rows):
        raise SystemExit(
            f"{args.record}: no run of gshard with {args.steps} steps to compare with; give --data to make one"
        )
    text = "\n".join(table(rows, speed).markdown())
    if args.write:
        args.write.write_text(filled(args.write.read_text(), "routers", text))
        plot(rows, speed, args.write.with_suffix(".svg"))
    else:
        print(text)
    return 0


def keep(record: Path, line: Row) -> None:
    with record.open("a") as file:
        file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    sys.exit(main())
