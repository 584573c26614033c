"""Training speed on this machine's CPU, side by side: gshardx, MaxText, Hugging Face's Mixtral; and checkpoint stalls.

    python benchmarks/train_cpu.py                      # everything, interleaved, as tables
    python benchmarks/train_cpu.py --devices 8 --json   # gshardx alone, one JSON object
    python benchmarks/train_cpu.py --stall              # the checkpoint table alone

Every measurement has a process of its own, since JAX fixes its devices when it starts. Seconds say as much about the
machine, and whoever else uses it, as about the programs: compare ratios.
"""

import argparse
import dataclasses
import datetime
import json
import os
import platform
import re
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
MAXTEXT = HERE.parent.parent / "shared" / "bench" / "maxtext_cpu.sh"
GOAL = 1.5
"""gshardx's tokens per second over MaxText's, on as many devices."""
NEXT_GOAL = 3_100
"""Tokens per second: about what Hugging Face's Mixtral reached on the two cores where the goal was set."""
STALL_GOAL = 0.10
"""What a save may keep training waiting, as a share of a save that is waited for."""

Row = dict[str, Any]


class NotMeasured(Exception):
    """Why a peer has no number."""


@dataclasses.dataclass(frozen=True)
class Contender:
    """One line of the table."""

    framework: str
    devices: int
    measure: Callable[[], Row]


def gshardx(devices: int, steps: int) -> Row:
    return _json_of([sys.executable, __file__, "--json", "--devices", str(devices), "--steps", str(steps)])


def maxtext(script: Path, devices: int, steps: int) -> Row:
    if not script.exists():
        raise NotMeasured("no script: give --maxtext PATH of one that prints tokens_per_second=N")
    line = _last_line(["bash", str(script), str(devices), str(steps)])
    fields = dict(re.findall(r"(\w+)=([\d.]+)", line))
    return {
        "tokens_per_second": float(fields["tokens_per_second"]),
        "median_step_seconds": float(fields["median_step_s"]),
        "versions": _maxtext_versions(),
    }


def hugging_face(python: str, steps: int) -> Row:
    probe = [python, "-c", "import torch, transformers"]
    if subprocess.run(probe, capture_output=True, check=False).returncode:
        raise NotMeasured("pip install torch transformers, or give --hf_python PATH")
    return _json_of([python, str(HERE / "hf_mixtral.py"), "--steps", str(steps)])


def stall(saves: int) -> Row:
    return _json_of([sys.executable, __file__, "--json", "--stall", "--saves", str(saves)])


def _maxtext_versions() -> str:
    venv = Path(os.environ.get("MAXTEXT_VENV", Path.home() / ".cache" / "maxtext-venv"))
    code = "from importlib.metadata import version as v; print(f\"maxtext {v('maxtext')}, jax {v('jax')}\")"
    try:
        return _last_line([str(venv / "bin" / "python"), "-c", code])
    except (OSError, NotMeasured):
        return "maxtext, version unknown"


def _json_of(command: list[str]) -> Row:
    row: Row = json.loads(_last_line(command))
    return row


def _last_line(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise NotMeasured(((done.stderr or done.stdout).strip().splitlines() or ["it failed"])[-1][:200])
    return done.stdout.strip().splitlines()[-1]


def rounds_of(contenders: list[Contender], rounds: int) -> dict[Contender, list[Row] | NotMeasured]:
    """Measure everyone once a round, one after the other, so that a slow minute of the machine hits them alike.

    Every other round runs backwards. Who fails once is not tried again.
    """
    found: dict[Contender, list[Row] | NotMeasured] = {one: [] for one in contenders}
    for number in range(rounds):
        for one in contenders[:: 1 if number % 2 == 0 else -1]:
            rows = found[one]
            if isinstance(rows, NotMeasured):
                continue
            try:
                rows.append(one.measure())
                say(
                    f"round {number + 1}: {one.framework} on {one.devices}: {rows[-1]['tokens_per_second']:,.0f} tokens/s"
                )
            except NotMeasured as reason:
                found[one] = reason
                say(f"round {number + 1}: {one.framework} on {one.devices}: not measured: {reason}")
    return found


def speed_table(found: dict[Contender, list[Row] | NotMeasured]) -> Iterator[str]:
    """Markdown: ratios first; medians over rounds, and the range of the ratios."""
    yield "| x MaxText (range) | framework | devices | tokens/s | s a step | compile s | dropped | notes |"
    yield "|---|---|---|---|---|---|---|---|"
    peers = {one.devices: rows for one, rows in found.items() if one.framework == "MaxText"}
    for one, rows in found.items():
        if isinstance(rows, NotMeasured):
            yield f"| - | {one.framework} | {one.devices} | not measured | | | | {rows} |"
        else:
            cells = [
                ratio_cell(ratios(rows, peers.get(one.devices))),
                one.framework,
                str(one.devices),
                f"{_median(rows, 'tokens_per_second'):,.0f}",
                f"{_median(rows, 'median_step_seconds'):.3f}",
                f"{_median(rows, 'compile_seconds'):.1f}" if "compile_seconds" in rows[0] else "",
                f"{_median(rows, 'drop_fraction'):.1%}" if "drop_fraction" in rows[0] else "not reported",
                rows[0].get("note", ""),
            ]
            yield f"| {' | '.join(cells)} |"


def ratios(rows: list[Row], peer: list[Row] | NotMeasured | None) -> list[float]:
    """Tokens per second over the peer's, round by round."""
    if peer is None or isinstance(peer, NotMeasured):
        return []
    return [row["tokens_per_second"] / other["tokens_per_second"] for row, other in zip(rows, peer, strict=True)]


def ratio_cell(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})" if values else "-"


def verdicts(found: dict[Contender, list[Row] | NotMeasured]) -> Iterator[str]:
    """One line a goal: reached, missed or not measured."""
    peers = {one.devices: rows for one, rows in found.items() if one.framework == "MaxText"}
    for one, rows in found.items():
        if one.framework != "gshardx" or isinstance(rows, NotMeasured):
            continue
        values = ratios(rows, peers.get(one.devices))
        got = (
            f"{statistics.median(values):.2f}, {_verdict(statistics.median(values) >= GOAL)}"
            if values
            else "not measured"
        )
        speed = _median(rows, "tokens_per_second")
        yield f"- {one.devices} device(s): at least {GOAL} x MaxText: {got}"
        yield f"- {one.devices} device(s): next, about {NEXT_GOAL:,} tokens/s: {speed:,.0f}, {_verdict(speed >= NEXT_GOAL)}"


def stall_table(row: Row) -> Iterator[str]:
    """Markdown: the ratio first, then what it is made of."""
    yield (
        "| stall / blocking save | stall s | save call s | blocking save s | steps beside the write | their delay s | "
        "step s | state MB | saves |"
    )
    yield "|---|---|---|---|---|---|---|---|---|"
    yield (
        f"| {row['stall_of_blocking']:.1%} | {row['stall_seconds']:.3f} | {row['save_call_seconds']:.3f} "
        f"| {row['blocking_seconds']:.3f} | {row['steps_beside_write']:.0f} | {row['later_slowdown_seconds']:.3f} "
        f"| {row['median_step_seconds']:.3f} | {row['state_bytes'] / 1e6:.0f} | {row['saves']} |"
    )
    yield ""
    yield f"- stall at most {STALL_GOAL:.0%} of a blocking save: {_verdict(row['stall_of_blocking'] <= STALL_GOAL)}"


def _verdict(reached: bool) -> str:
    return "reached" if reached else "missed"


def _median(rows: list[Row], name: str) -> float:
    return statistics.median(row[name] for row in rows)
