"""Every router trained at equal active FLOPs, and a dense model beside them.

    python benchmarks/routers.py --data english.parquet --record routers.jsonl            # one seed of each
    python benchmarks/routers.py --data english.parquet --record routers.jsonl --seeds 3 --routers gshard top_k
    python benchmarks/routers.py --record routers.jsonl                                   # the table of what there is

The quickstart's shape on one CPU device. A run that is in the record is not made again, so the table may grow over
days; losses do not depend on what else the machine does, tokens per second do, and are ratios over the `gshard` run
before.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from timing import Table, filled

from gshardx.layers.routing import ROUTERS

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
LAST = 50
"""Steps that statistics are means of."""

Row = dict[str, Any]


def options(name: str) -> dict[str, Any]:
    """Of ``model.moe``; what is not there is the quickstart's."""
    if name == "dense":
        return DENSE
    own: dict[str, dict[str, Any]] = {
        "switch": {"top_k": 1, "hidden": HIDDEN * TOP_K},
        "base": {"top_k": 1, "hidden": HIDDEN * TOP_K, "losses": "{balance: 0.0}"},
        "sinkhorn": {"losses": "{balance: 0.0}"},
        "hash": {"losses": "{balance: 0.0}"},
        "noisy_top_k": {"losses": "{importance: 0.1, load: 0.1}"},
        "smear": {"top_k": 1, "hidden": HIDDEN * TOP_K, "losses": "{balance: 0.0}"},
        "lory": {"top_k": 1, "hidden": HIDDEN * TOP_K, "losses": "{balance: 0.0}"},
        "meo": {"hidden": HIDDEN * TOP_K, "losses": "{importance: 0.01, load: 0.01}"},
        "expert_choice": {"capacity_factor": 1.0, "losses": "{balance: 0.0}"},
    }
    return {"router": name, **own.get(name, {})}


def trained(name: str, seed: int, args: argparse.Namespace) -> Row:
    """One run's figures.

    Raises:
        SystemExit: it failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        flags = {"run_dir": run, "seed": seed, "data.path": args.data, "mesh.expert": 1, "train.steps": args.steps}
        flags |= {f"model.moe.{option}": value for option, value in options(name).items()}
        flags |= {"checkpoint.every": args.steps, "train.eval_every": args.steps}
        command("gshardx.train", flags)
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
        "tokens_per_second": statistics.median(line["perf/tokens_per_second"] for line in steps),
    }


def mean(lines: list[Row], name: str) -> float:
    return statistics.fmean(line[name] for line in lines)


def exchanged(name: str) -> float:
    """Bytes that a device's all-to-alls move in a step on the quickstart's mesh of 8."""
    flags = {f"model.moe.{option}": value for option, value in options(name).items()}
    if name == "dense":
        flags |= {"mesh.expert": 1, "mesh.data": 8}
    found = json.loads(command("gshardx.plan", {**flags, "topology": "cpu:8"}, "--json"))
    return sum(one["count"] * one["bytes_per_device"] for one in found["collectives"] if one["op"] == "all-to-all")


def command(module: str, flags: dict[str, Any], *more: str) -> str:
    given = [word for flag, value in flags.items() for word in (f"--{flag}", str(value))]
    words = [sys.executable, "-m", module, "--config", str(CONFIG), *given, *more]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(words)}\n{done.stderr.strip().splitlines()[-1]}")
    return done.stdout


def table(rows: list[Row]) -> Table:
    """Means over seeds, best first; losses and speeds over those of gshard with the same seeds and steps."""
    reference = {row["seed"]: row for row in rows if row["router"] == "gshard"}
    made = []
    for name in dict.fromkeys(row["router"] for row in rows):
        own = [row for row in rows if row["router"] == name and row["seed"] in reference]
        losses = [row["loss"] for row in own]
        made.append(
            {
                "router": name,
                "loss": statistics.fmean(losses),
                "x gshard's": statistics.fmean(row["loss"] / reference[row["seed"]]["loss"] for row in own),
                "seeds": len(own),
                "spread": max(losses) - min(losses) if len(own) > 1 else None,
                "bits per byte": mean(own, "bits_per_byte"),
                "load max / mean": mean(own, "load_max_over_mean"),
                "dropped %": 100 * mean(own, "drop_fraction"),
                "entropy": mean(own, "entropy"),
                "speed x gshard's": statistics.fmean(
                    row["tokens_per_second"] / row.get("gshard_tokens_per_second", row["tokens_per_second"])
                    for row in own
                ),
                "all-to-all MB": own[0]["all_to_all_bytes"] / 1e6,
            }
        )
    made.sort(key=lambda row: row["loss"])
    far = ", ".join(row["router"] for row in made if row["x gshard's"] > WITHIN) or "none"
    return Table(f"{rows[0]['steps']} steps", made, [f"further than 3 % above gshard's loss: {far}"])


def missing(args: argparse.Namespace, rows: list[Row]) -> Iterator[tuple[str, int]]:
    there = {(row["router"], row["seed"]) for row in rows if row["steps"] == args.steps}
    for seed in range(args.seeds):
        for name in dict.fromkeys(["gshard", *args.routers]):
            if (name, seed) not in there:
                yield name, seed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = ["dense", *ROUTERS]
    parser.add_argument("--data", type=Path, help="text to train on; without it, only the record is shown")
    parser.add_argument("--record", type=Path, required=True, help="a JSON object a run; grows")
    parser.add_argument("--routers", nargs="+", choices=names, default=names)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--write", type=Path, metavar="PAGE", help="put the table between the page's markers")
    args = parser.parse_args()
    rows = [json.loads(line) for line in args.record.read_text().splitlines()] if args.record.exists() else []
    speed = None
    for name, seed in missing(args, rows) if args.data else ():
        row = trained(name, seed, args) | {"all_to_all_bytes": exchanged(name)}
        speed = row["tokens_per_second"] if name == "gshard" else speed
        if speed is not None:
            row["gshard_tokens_per_second"] = speed
        rows.append(row)
        with args.record.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(f"{name}, seed {seed}: loss {row['loss']:.3f}", file=sys.stderr, flush=True)
    if not any(row["router"] == "gshard" and row["steps"] == args.steps for row in rows):
        raise SystemExit(
            f"{args.record}: no run of gshard with {args.steps} steps to compare with; give --data to make one"
        )
    text = "\n".join(table([row for row in rows if row["steps"] == args.steps]).markdown())
    if args.write:
        args.write.write_text(filled(args.write.read_text(), "routers", text))
    else:
        print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
