"""Converting a public checkpoint in and out, beside copying its files: speed, and the most memory that a process takes.

    python benchmarks/convert_cpu.py [--gigabytes 4] [--rounds 2] [--output FILE]     # some minutes

Random bfloat16 in the layout of Mixtral. Files are out of the page cache before each turn and on the disk after it. It
takes four times as much of the disk.
"""

import argparse
import datetime
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from report import Machine
from timing import Table, cell

from gshardx.config import ModelConfig, MoEConfig
from gshardx.convert.families import FAMILIES
from gshardx.convert.outgoing import form_of
from gshardx.convert.outgoing import write_model as write_public
from gshardx.convert.source import layout_of
from gshardx.sharding import MeshConfig, build_mesh

SPEED, ABOVE = 50.0, 1.0
"""Goals: percent of the speed of copying; GB above twice the largest tensor."""
SHARD = 1_000_000_000  # bytes of a file


class Turn(NamedTuple):
    seconds: float
    peak: int
    """Bytes of memory, resident."""


LAYER_GIGABYTES = 0.73


def model(layers: int, width: int = 2048, hidden: int = 7168, vocab: int = 32_000) -> ModelConfig:
    """Mixtral's layout: experts that are most of it."""
    moe = MoEConfig(num_experts=8, top_k=2, every=1, hidden=hidden, capacity_factor=None, router="top_k")
    return ModelConfig(
        layers=layers, width=width, heads=16, kv_heads=4, head_dim=width // 16, hidden=hidden, norm_epsilon=1e-5,
        vocab_size=vocab, moe=moe,
    )  # fmt: skip


def write_source(folder: Path, config: ModelConfig) -> int:
    """Make the checkpoint; returns the bytes of its largest tensor."""
    folder.mkdir()
    draw, vocab = np.random.default_rng(0), config.vocab_size
    assert vocab is not None
    form = form_of(config, vocab, None, "the benchmark")
    layout = layout_of(FAMILIES["mixtral"], config, vocab, build_mesh(MeshConfig()))

    def value(leaf: Any) -> np.ndarray:
        shape = layout.shapes[leaf.name][0][len(leaf.at) :]
        # Numbers of 1 to 2: random bits would hold NaNs.
        return (draw.integers(0, 128, shape, np.uint16) | 0x3F80).view(np.dtype("bfloat16"))

    write_public(folder, form, layout, dict.fromkeys(layout.shapes, "bfloat16"), "bfloat16", SHARD, value)
    return max(2 * int(np.prod(piece.shape)) for piece in layout.pieces)


def files_of(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.rglob("*")) if path.is_file()]


def settle(folder: Path) -> None:
    """Bring files to the disk, and take them out of the page cache."""
    for path in files_of(folder):
        file = os.open(path, os.O_RDONLY)
        os.fsync(file)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(file)


def turn(command: Sequence[str], source: Path, target: Path) -> Turn:
    """Run a command that makes ``target`` of ``source``, until all is on the disk."""
    settle(source)
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{' '.join(command)}: ended with {status}")
    settle(target)
    return Turn(time.perf_counter() - start, usage.ru_maxrss * 1024)


def measure(config: ModelConfig, rounds: int, folder: Path) -> tuple[list[dict[str, Any]], list[str]]:
    source, copy, run, back = (folder / name for name in ("source", "copy", "run", "back"))
    largest = write_source(source, config)
    size = sum(path.stat().st_size for path in files_of(source))
    convert = [sys.executable, "-m", "gshardx.convert"]
    turns: dict[str, list[Turn]] = {"copy": [], "in": [], "out": []}
    for _ in range(rounds):
        turns["copy"].append(turn(["cp", "-r", str(source), str(copy)], source, copy))
        turns["in"].append(turn([*convert, "--from", str(source), "--to", str(run)], source, run))
        turns["out"].append(turn([*convert, "--from", str(run), "--to", str(back)], run, back))
        for one, two in zip(files_of(source), files_of(back), strict=True):
            subprocess.run(["cmp", str(one), str(two)], check=True)
        for made in (copy, run, back):
            shutil.rmtree(made)
    rows = []
    for way in ("in", "out"):
        share = 100 * statistics.median(c.seconds / t.seconds for c, t in zip(turns["copy"], turns[way], strict=True))
        above = (max(one.peak for one in turns[way]) - 2 * largest) / 1e9
        rows += [
            _row(f"{way}: of the speed of copying", share, "%", f"at least {SPEED:g} %", share >= SPEED),
            _row(f"{way}: memory above twice the largest tensor", above, "GB", f"under {ABOVE:g} GB", above < ABOVE),
        ]
    rates = ", ".join(f"{name} {size / statistics.median(t.seconds for t in turns[name]) / 1e6:,.0f}" for name in turns)
    notes = [
        f"{size / 1e9:.2f} GB in files of {SHARD / 1e9:g} GB; largest tensor {largest / 1e6:.0f} MB; MB/s: {rates}",
        f"{rounds} rounds; what came back is byte for byte what went in",
    ]
    return rows, notes


def _row(what: str, value: float, unit: str, goal: str, holds: bool) -> dict[str, Any]:
    return {"what": what, "measured": f"{cell(value)} {unit}", "goal": goal, "holds": "yes" if holds else "no"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=4.0, help="about, of the checkpoint (default 4)")
    parser.add_argument("--small", action="store_true", help="a tiny one, which measures nothing")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="where files are written (default: the system's folder for them)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write there what is printed, too")
    options = parser.parse_args()
    os.environ["JAX_PLATFORMS"] = "cpu"
    layers = max(1, round(options.gigabytes / LAYER_GIGABYTES))
    config = model(2, width=64, hidden=96, vocab=160) if options.small else model(layers)
    machine = Machine()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        rows, notes = measure(config, options.rounds, Path(name))
    table = "\n".join(Table("Converting a public checkpoint", rows, notes).markdown())
    print(f"{table}\n{machine}")
    if options.output is not None:
        title = f"# Converting a public checkpoint, {datetime.date.today()}"
        command = f"python benchmarks/convert_cpu.py --gigabytes {options.gigabytes:g} --rounds {options.rounds}"
        how = f"```sh\n{command}\n```\n\nAs printed."
        options.output.write_text(f"{title}\n\n{how}\n\n{table}\n{machine}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
