"""Decoding on this machine's CPU, side by side: gshardx's engine, Hugging Face's generate and llama.cpp.

    python benchmarks/decode_cpu.py --hf_python PYTHON --llama_python PYTHON  # everything, in turns: a table and goals
    python benchmarks/decode_cpu.py --json --batches 1 8 32                   # gshardx alone, one JSON object
    python benchmarks/decode_cpu.py --json --weights int8

The model "mixtral" of train_cpu.py. Greedy, random weights, fp32, 64 tokens of prompt and 128 after it, the time of the
prompt left out. The roofline is the memory's: bytes that must be read for a token over the bandwidth that two threads
reach here. llama.cpp has no goal: it stands beside as what hand-written kernels reach. The others' threads wait as
OpenMP has them by default; OMP_WAIT_POLICY=ACTIVE makes them faster on a machine that nobody else uses, PASSIVE slower.
"""

import argparse
import dataclasses
import itertools
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
Measured = dict[str, dict[int, list[dict[str, Any] | None]]]
"""Of each peer, of each batch, what each round found."""
TIMES, ROOFLINE, WARM_SECONDS = 3.0, 0.5, 5.0
"""Goals: times Hugging Face, share of the roofline, seconds until a first token, the model's making among them."""


@dataclasses.dataclass(frozen=True)
class Peer:
    name: str
    python: str
    script: str
    imports: str
    mend: str

    def measure(self, batch: int) -> dict[str, Any]:
        """Raises NotMeasured."""
        command = [self.python, "-c", f"import {self.imports}"]
        if subprocess.run(command, capture_output=True, check=False).returncode:
            raise NotMeasured(self.mend)
        command = [self.python, str(HERE / self.script), "--batch", str(batch)]
        found: dict[str, Any] = json.loads(last_line(command)[0])
        return found


def main() -> int:
    args = parse()
    if args.json:
        return measure_here(args)
    machine = Machine()
    peers = (
        Peer("HF", args.hf_python, "hf_generate.py", "torch, transformers",
             "pip install torch transformers, there or in --hf_python PYTHON"),
        Peer("llama.cpp", args.llama_python, "llama_cpp_generate.py", "llama_cpp, gguf",
             "pip install llama-cpp-python gguf, there or in --llama_python PYTHON"),
    )  # fmt: skip
    ours: list[dict[str, Any]] = []
    theirs: Measured = {one.name: {n: [] for n in args.batches} for one in peers}
    reasons: set[str] = set()
    first_start = gshardx(args)["start_seconds"]  # the others find the programs that it keeps, as a user's do
    for number in range(args.rounds):
        ours.append(gshardx(args))
        for peer, batch in itertools.product(peers, args.batches):
            try:
                found = peer.measure(batch)
            except NotMeasured as reason:
                found = None
                reasons.add(f"{peer.name}, batch {batch}, not measured: {reason}")
            theirs[peer.name][batch].append(found)
        print(f"round {number + 1} of {args.rounds} done", file=sys.stderr, flush=True)
    print("\n".join(table(ours, theirs, sorted(reasons), first_start).markdown()))
    for line in goals(ours, theirs["HF"]):
        print(f"- {line}")
    print(f"\nOMP_WAIT_POLICY {os.environ.get('OMP_WAIT_POLICY', 'default')}; {machine}")
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32], metavar="N", help="sequences at a time")
    parser.add_argument("--rounds", type=int, default=3, help="how often each has its turn")
    parser.add_argument("--json", action="store_true", help="measure gshardx alone and print its row")
    parser.add_argument("--hf_python", default=sys.executable, metavar="PYTHON", help="has torch and transformers")
    parser.add_argument("--llama_python", default=sys.executable, metavar="PYTHON", help="has llama_cpp and gguf")
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


def table(
    ours: list[dict[str, Any]],
    theirs: Measured,
    reasons: list[str],
    first_start: float,
) -> Table:
    rows, last = [], ours[-1]
    for key in last["batches"]:
        mine = [row["batches"][key] for row in ours]
        speeds = [row["tokens_per_second"] for row in mine]
        row: dict[str, Any] = {"batch": int(key), "gshardx tokens/s": statistics.median(speeds)}
        for name, found in theirs.items():
            peer = [one["tokens_per_second"] for one in found[int(key)] if one]
            ratios = ratios_of(speeds, found[int(key)])
            row[f"{name} tokens/s"] = statistics.median(peer) if peer else None
            row[f"x {name}"] = statistics.median(ratios) if ratios else None
            row[f"{name} range"] = f"{min(ratios):.2f} to {max(ratios):.2f}" if ratios else ""
        row["of the roofline"] = statistics.median(share(one) for one in mine)
        row["padded/true"] = statistics.median(one["padded_over_true"] for one in mine)
        rows.append(row)
    measured = [one for found in theirs.values() for batch in found.values() for one in batch[-1:] if one]
    versions = dict.fromkeys(name for one in [last, *measured] for name in one["versions"])
    notes = [
        f"{last['programs']} programs; the engine's first start {first_start:.1f} s, its last "
        f"{last['start_seconds']:.1f} s with {last['compiled']} compilations, then {last['first_token_seconds']:.1f} s "
        "in all to the first token",
        f"guesses that were right: {last['guesses']}; {', '.join(versions)}",
        *dict.fromkeys(one["note"] for one in measured if "note" in one),
        *reasons,
    ]
    return Table("Decoding: 4 layers, width 256, 8 experts of 512, top 2, vocabulary 4,096, fp32", rows, notes)


def ratios_of(speeds: list[float], peer: list[dict[str, Any] | None]) -> list[float]:
    return [speed / one["tokens_per_second"] for speed, one in zip(speeds, peer, strict=True) if one]


def goals(ours: list[dict[str, Any]], theirs: dict[int, list[dict[str, Any] | None]]) -> list[str]:
    found = []
    for batch, peer in theirs.items():
        mine = [row["batches"][str(batch)] for row in ours]
        ratios = ratios_of([one["tokens_per_second"] for one in mine], peer)
        if ratios:
            found.append(goal(f"batch {batch} beside Hugging Face", statistics.median(ratios), TIMES, at_least=True))
        shares = statistics.median(share(one) for one in mine)
        found.append(goal(f"batch {batch} of the memory roofline", shares, ROOFLINE, at_least=True, unit=""))
    found.append(goal("warm start to the first token", ours[-1]["first_token_seconds"], WARM_SECONDS, unit=" s"))
    return found


def share(row: dict[str, Any]) -> float:
    return float(row["tokens_per_second"] / row["roofline"])


if __name__ == "__main__":
    sys.exit(main())
