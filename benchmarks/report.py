"""What the benchmark prints: Markdown tables that lead with ratios, the goals, and what machine it was."""

import datetime
import os
import platform
import statistics
from collections.abc import Iterator
from typing import Any, NamedTuple

GSHARDX, MAXTEXT, HUGGING_FACE = "gshardx", "MaxText", "Hugging Face"
GOALS = {MAXTEXT: 2.0, HUGGING_FACE: 1.0}
"""gshardx's tokens per second over each peer's, on as many devices."""
STALL_GOAL = 0.10
"""What a save may keep training waiting, as a share of a save that is waited for."""

Row = dict[str, Any]


class NotMeasured(Exception):
    """Why there is no number."""


class Line(NamedTuple):
    """One line of the speed table: a row a round, or why there are none."""

    framework: str
    shape: str
    devices: int
    rows: list[Row] | NotMeasured


def speed_table(lines: list[Line]) -> Iterator[str]:
    """Medians over rounds; for ratios, which are taken within a round, the range as well.

    The share of the CPU that others used during each round says which rows were measured alike.
    """
    yield (
        "| shape | devices | framework | gshardx is x times as fast (range) | tokens/s | s a step | compile s "
        "| peak MB | dropped | others | notes |"
    )
    yield "|---|---|---|---|---|---|---|---|---|---|---|"
    for line in lines:
        rows, start = line.rows, f"| {line.shape} | {line.devices} | {line.framework} |"
        if isinstance(rows, NotMeasured):
            yield f"{start} - | not measured | | | | | | {_one_cell(rows)} |"
            continue
        ratio = _ratio_cell(ratios(line, lines))
        speed, step = _median(rows, "tokens_per_second"), _median(rows, "median_step_seconds")
        peak = _median(rows, "peak_bytes") / 1e6
        compiling = f"{_median(rows, 'compile_seconds'):.1f}" if "compile_seconds" in rows[0] else ""
        dropped = f"{_median(rows, 'drop_fraction'):.1%}" if "drop_fraction" in rows[0] else "not reported"
        notes = " / ".join(dict.fromkeys(row["note"] for row in rows if "note" in row))
        others = ", ".join(row["others"] for row in rows)
        figures = f"{speed:,.0f} | {step:.3f} | {compiling} | {peak:,.0f} | {dropped}"
        yield f"{start} {ratio} | {figures} | {others} | {notes} |"


def speed_goals(lines: list[Line]) -> Iterator[str]:
    """Each goal and whether it is reached."""
    for line in (line for line in lines if line.framework in GOALS):
        goal, on = GOALS[line.framework], f"{line.shape} on {line.devices} device{'s' if line.devices > 1 else ''}"
        values = ratios(line, lines)
        if values:
            ratio = statistics.median(values)
            yield f"- goal, {on}: {goal} x {line.framework}; it is {ratio:.2f} x: {_verdict(ratio >= goal)}"
        else:
            yield f"- goal, {on}: {goal} x {line.framework}: not measured"


def ratios(line: Line, lines: list[Line]) -> list[float]:
    """gshardx's tokens per second over those of ``line``, a peer's, on the same shape and devices, round by round."""
    same = (one.rows for one in lines if (one.framework, *one[1:3]) == (GSHARDX, *line[1:3]))
    ours = next(same, None)
    if line.framework == GSHARDX or not isinstance(ours, list) or not isinstance(line.rows, list):
        return []
    return [row["tokens_per_second"] / other["tokens_per_second"] for row, other in zip(ours, line.rows, strict=True)]


def stall_table(row: Row) -> Iterator[str]:
    """The stall beside a save that is waited for, then what the write costs the steps after it."""
    both = (max(row["stall_seconds"], row["save_call_seconds"]) + row["later_delay_seconds"]) / row["blocking_seconds"]
    yield (
        "| stall / blocking save | stall s | the save call alone s | blocking save s | steps beside the write "
        "| their delay s | (stall + delay) / blocking | quiet step s | state MB | saves |"
    )
    yield "|---|---|---|---|---|---|---|---|---|---|"
    yield (
        f"| {row['stall_of_blocking']:.1%} | {row['stall_seconds']:.3f} | {row['save_call_seconds']:.3f} "
        f"| {row['blocking_seconds']:.3f} | {row['steps_beside_write']:.0f} | {row['later_delay_seconds']:.3f} "
        f"| {both:.0%} | {row['median_step_seconds']:.3f} | {row['state_bytes'] / 1e6:.0f} | {row['saves']} |"
    )
    yield ""
    yield (
        f"- goal: a stall of at most {STALL_GOAL:.0%} of a blocking save; it is {row['stall_of_blocking']:.1%}: "
        f"{_verdict(row['stall_of_blocking'] <= STALL_GOAL)}"
    )


def versions(rows: list[Row]) -> str:
    """Of everything that was measured, each once."""
    return "; ".join(dict.fromkeys(name for row in rows for name in row["versions"]))


class Machine:
    """This machine, and how much of it others used since the object was made."""

    def __init__(self) -> None:
        self._before = _cpu_seconds()

    def others(self) -> str:
        """Other programs' share of all cores; an own program that has ended is none of them."""
        now, before = _cpu_seconds(), self._before
        if not now or not before:
            return "unknown"
        total, busy, own = (a - b for a, b in zip(now, before, strict=True))
        return f"{max(busy - own, 0.0) / max(total, 1e-9):.0%}"

    def __str__(self) -> str:
        facts = [f"{os.cpu_count()} CPU cores", platform.machine(), f"Python {platform.python_version()}"]
        return f"{datetime.date.today()}, {', '.join(facts)}; others used {self.others()} of the CPU meanwhile"


def _cpu_seconds() -> tuple[float, float, float] | None:
    """Of all cores since boot: total, busy; and what this process and its finished children used. Linux only."""
    try:
        with open("/proc/stat") as file:
            ticks = [int(field) for field in file.readline().split()[1:9]]
    except OSError:
        return None
    total, idle = sum(ticks), ticks[3] + ticks[4]
    per_second = os.sysconf("SC_CLK_TCK")
    return total / per_second, (total - idle) / per_second, sum(os.times()[:4])


def _ratio_cell(values: list[float]) -> str:
    if not values:
        return "-"
    spread = f" ({min(values):.2f} to {max(values):.2f})" if max(values) > min(values) else ""
    return f"{statistics.median(values):.2f}{spread}"


def _median(rows: list[Row], name: str) -> float:
    return statistics.median(row[name] for row in rows)


def _one_cell(reason: NotMeasured) -> str:
    return str(reason).replace("|", "/")


def _verdict(reached: bool) -> str:
    return "reached" if reached else "missed"
