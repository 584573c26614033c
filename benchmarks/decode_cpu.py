"""Decoding on this machine's CPU, side by side: gshardx's engine and Hugging Face's generate.

    python benchmarks/decode_cpu.py --hf_python PYTHON             # everything, in turns: one table and the goals
    python benchmarks/decode_cpu.py --json --batches 1 8 32        # gshardx alone, one JSON object
    python benchmarks/decode_cpu.py --json --weights int8

The model "mixtral" of train_cpu.py. Greedy, random weights, fp32, 64 tokens of prompt and 128 after it, the time of the
prompt left out. The roofline is the memory's: bytes that must be read for a token over the bandwidth that two threads
reach here.
"""

import argparse
import json
import logging
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from commands import last_line
from report import Machine, NotMeasured
from shape import MIXTRAL
from timing import Table, goal

HERE = Path(__file__).resolve().parent
TIMES, ROOFLINE, WARM_SECONDS = 3.0, 0.5, 5.0
"""Goals: times Hugging Face, share of the roofline, seconds until a first token, the model's making among them."""


def main() -> int:
    args = parse()
    if args.json:
        return measure_here(args)
    machine = Machine()
    ours: list[dict[str, Any]] = []
    theirs: dict[int, list[dict[str, Any]]] = {batch: [] for batch in args.batches}
    reasons: dict[int, str] = {}
    first_start = gshardx(args)["start_seconds"]  # the others find the programs that it keeps, as a user's do
    for number in range(args.rounds):
        ours.append(gshardx(args))
        for batch in args.batches:
            try:
                theirs[batch].append(hugging_face(args.hf_python, batch))
            except NotMeasured as reason:
                reasons[batch] = str(reason)
        print(f"round {number + 1} of {args.rounds} done", file=sys.stderr, flush=True)
    print("\n".join(table(ours, theirs, reasons, first_start).markdown()))
    for line in goals(ours, theirs):
        print(f"- {line}")
    print(f"\n{machine}")
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32], metavar="N", help="sequences at a time")
    parser.add_argument("--rounds", type=int, default=3, help="how often each has its turn")
    parser.add_argument("--json", action="store_true", help="measure gshardx alone and print its row")
    parser.add_argument("--hf_python", default=sys.executable, metavar="PYTHON", help="has torch and transformers")
    for name in ("weights", "kv_dtype", "drafts"):
        parser.add_argument(f"--{name}", help="as of python -m gshardx.infer")
    return parser.parse_args()


def measure_here(args: argparse.Namespace) -> int:
    os.environ["JAX_PLATFORMS"] = "cpu"  # before JAX is imported
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    import gshardx_decode

    options = {name: getattr(args, name) for name in ("weights", "kv_dtype", "drafts")}
    print(json.dumps(gshardx_decode.measure(MIXTRAL, args.batches, **options)))
    return 0


def gshardx(args: argparse.Namespace) -> dict[str, Any]:
    options = [f"--{name}={value}" for name in ("weights", "kv_dtype", "drafts") if (value := getattr(args, name))]
    batches = [str(batch) for batch in args.batches]
    found: dict[str, Any] = json.loads(
        last_line([sys.executable, __file__, "--json", *options, "--batches", *batches])[0]
    )
    return found


def hugging_face(python: str, batch: int) -> dict[str, Any]:
    """Raises NotMeasured."""
    if subprocess.run([python, "-c", "import torch, transformers"], capture_output=True, check=False).returncode:
        raise NotMeasured("pip install torch transformers, there or in --hf_python PYTHON")
    # OpenMP's threads spin while they wait, and lose two thirds of their speed where others use the cores too.
    environment = {"OMP_WAIT_POLICY": "PASSIVE", **os.environ}
    command = [python, str(HERE / "hf_generate.py"), "--batch", str(batch)]
    found: dict[str, Any] = json.loads(last_line(command, environment)[0])
    return found


def table(
    ours: list[dict[str, Any]], theirs: dict[int, list[dict[str, Any]]], reasons: dict[int, str], first_start: float
) -> Table:
    rows = []
    for batch, peer in theirs.items():
        mine = [row["batches"][str(batch)] for row in ours]
        speeds = [row["tokens_per_second"] for row in mine]
        ratios = [a / row["tokens_per_second"] for a, row in zip(speeds, peer, strict=False)]
        rows.append(
            {
                "batch": batch,
                "x Hugging Face": statistics.median(ratios) if ratios else None,
                "range": f"{min(ratios):.2f} to {max(ratios):.2f}" if ratios else reasons[batch],
                "gshardx tokens/s": statistics.median(speeds),
                "HF tokens/s": statistics.median(row["tokens_per_second"] for row in peer) if peer else None,
                "of the roofline": statistics.median(share(one) for one in mine),
                "padded/true": statistics.median(one["padded_over_true"] for one in mine),
                "HF": peer[-1]["note"] if peer else "",
            }
        )
    last = ours[-1]
    versions = [*last["versions"], *next((peer[-1]["versions"] for peer in theirs.values() if peer), [])]
    notes = [
        f"{last['programs']} programs; the engine's first start {first_start:.1f} s, its last "
        f"{last['start_seconds']:.1f} s with {last['compiled']} compilations, then {last['first_token_seconds']:.1f} s "
        "in all to the first token",
        f"guesses that were right: {last['guesses']}; {', '.join(versions)}",
    ]
    return Table("Decoding: 4 layers, width 256, 8 experts of 512, top 2, vocabulary 4,096, fp32", rows, notes)


def goals(ours: list[dict[str, Any]], theirs: dict[int, list[dict[str, Any]]]) -> list[str]:
    found = []
    for batch, peer in theirs.items():
        mine = [row["batches"][str(batch)] for row in ours]
        if peer:
            ratios = [a["tokens_per_second"] / b["tokens_per_second"] for a, b in zip(mine, peer, strict=False)]
            found.append(goal(f"batch {batch} beside Hugging Face", statistics.median(ratios), TIMES, at_least=True))
        shares = statistics.median(share(one) for one in mine)
        found.append(goal(f"batch {batch} of the memory roofline", shares, ROOFLINE, at_least=True, unit=""))
    found.append(goal("warm start to the first token", ours[-1]["first_token_seconds"], WARM_SECONDS, unit=" s"))
    return found


def share(row: dict[str, Any]) -> float:
    return float(row["tokens_per_second"] / row["roofline"])


if __name__ == "__main__":
    sys.exit(main())
