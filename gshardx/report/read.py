"""A run's folder as arrays. Lines that were cut off or hold something else are passed over."""

import dataclasses
import json
import math
import operator
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml
from numpy.typing import NDArray

from gshardx.errors import BadInput

Floats = NDArray[np.float64]
Steps = NDArray[np.int64]

_WANTED = re.compile(
    r"learning/(loss|grad_norm|current_learning_rate)|perf/(tokens_per_second|mfu)|guard/(skipped_steps|rollbacks)|"
    r"moe/(layer_\d+/)?(drop_fraction|load_max_over_mean|entropy|dead_experts)|evaluation/.+|goodput/.+"
)
LARGEST_STEP = 2**53
LARGEST = 1e60
"""Greater numbers, which no float32 holds, count as not finite."""
BLOCK = 2000
"""Lines."""


class Series(NamedTuple):
    """What was logged under one name."""

    steps: Steps
    """[n], ascending."""
    values: Floats
    """[n]; NaN where the number was not finite."""

    @property
    def finite(self) -> "Series":
        good = np.isfinite(self.values)
        return Series(self.steps[good], self.values[good])

    @property
    def last(self) -> float | None:
        values = self.finite.values
        return float(values[-1]) if len(values) else None


NOTHING = Series(np.zeros(0, np.int64), np.zeros(0))


class Load(NamedTuple):
    """Each expert's share of the choices over the mean, by window: from the step before it to its own."""

    steps: Steps
    """[window]"""
    values: Floats
    """[window, layer, expert]; 1.0 is balance."""


@dataclasses.dataclass(frozen=True)
class Event:
    time: float | None
    """Unix seconds."""
    step: int | None
    kind: str
    text: str
    about: dict[str, Any] = dataclasses.field(default_factory=dict)
    """All of the line."""


@dataclasses.dataclass(frozen=True)
class Run:
    """One run as its folder tells it. What a file would have said is None or empty where ``missing`` says why."""

    name: str
    series: dict[str, Series]
    config: dict[str, Any]
    """Dotted keys."""
    load: Load | None
    goodput: dict[str, float]
    """Seconds by bucket."""
    starts: int | None
    events: list[Event] | None
    missing: dict[str, str]
    """By file name: one line."""

    def get(self, name: str) -> Series:
        return self.series.get(name, NOTHING)

    def layers(self, figure: str) -> list[Series]:
        """By MoE layer."""
        names = [name for name in self.series if re.fullmatch(rf"moe/layer_\d+/{figure}", name)]
        return [self.series[name] for name in sorted(names, key=lambda name: int(name.split("/")[1][6:]))]

    def sources(self) -> list[str]:
        """Of the evaluation, in the order they were logged."""
        return list(dict.fromkeys(name[11:].rpartition("/")[0] for name in self.series if name.count("/") > 1
                                  and name.startswith("evaluation/")))  # fmt: skip

    @property
    def span(self) -> tuple[int, int]:
        """First and last logged step."""
        steps = [series.steps for series in self.series.values() if len(series.steps)]
        return min(int(one[0]) for one in steps), max(int(one[-1]) for one in steps)


def read_run(path: Path) -> Run:
    """Read what ``python -m gshardx.train`` left in ``path``.

    Raises:
        BadInput: no such folder, or no step in its metrics.jsonl.
    """
    if not path.is_dir():
        raise BadInput(f"{path}: no such folder; give a run's folder (run_dir of its config)")
    series = _read_metrics(path / "metrics.jsonl")
    missing: dict[str, str] = {}
    config = _read_config(path / "config.yaml", missing)
    load = _read_load(path / "expert_load.jsonl", missing)
    goodput, starts = _read_goodput(path / "goodput.json", series, missing)
    events = _read_events(path / "events.jsonl", missing)
    return Run(path.resolve().name, series, config, load, goodput, starts, events, missing)


def standing(steps: Steps) -> NDArray[np.bool_]:
    """The lines that a later one has not taken back: a resumed or rolled-back run writes its steps once more."""
    if not len(steps):
        return np.zeros(0, bool)
    later = np.minimum.accumulate(steps[::-1])[::-1]
    return np.append(steps[:-1] < later[1:], True)


def _read_metrics(path: Path) -> dict[str, Series]:
    steps: list[int] = []
    parts: dict[str, list[tuple[Steps, Floats]]] = {}
    for names, rows in _blocks(path):
        first = len(steps)
        steps += [row[0] for row in rows]
        values = _numbers(rows)
        for column, name in enumerate(names):
            parts.setdefault(name, []).append((np.arange(first, len(steps)), values[:, column + 1]))
    every = np.array(steps, np.int64)
    kept = standing(every)
    found = {}
    for name, pieces in parts.items():
        at, values = (np.concatenate(piece) for piece in zip(*pieces, strict=True))
        at, values = at[kept[at]], values[kept[at]]
        if len(at):
            found[name] = Series(every[at], np.where(np.abs(values) < LARGEST, values, np.nan))
    if not found:
        raise BadInput(f"{path}: no line of it is a step of a run; wait for the first, or give another folder")
    return found


def _blocks(path: Path) -> Iterator[tuple[list[str], list[tuple[Any, ...]]]]:
    """Neighbouring lines with the same keys: the wanted names among these, and for each line its step and values.

    A long run has millions of values; taking them a line at a time halves the time that a value at a time takes.
    """
    keys: tuple[str, ...] = ()
    names: list[str] = []
    rows: list[tuple[Any, ...]] = []
    for record in _lines(path):
        if tuple(record) != keys or len(rows) == BLOCK:
            if rows:
                yield names, rows
            keys, rows = tuple(record), []
            names = [name for name in keys if _WANTED.fullmatch(name)]
            values = operator.itemgetter("step", "step", *names)
        rows.append(values(record)[1:])
    if rows:
        yield names, rows


def _numbers(rows: list[tuple[Any, ...]]) -> Floats:
    """NaN for null, which is what the trainer writes for NaN, and for what is no number."""
    try:
        return np.array(rows, np.float64)
    except (TypeError, ValueError, OverflowError):
        return np.array([[math.nan if _number(one) is None else one for one in row] for row in rows], np.float64)


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """The lines that are objects with a step."""
    try:
        with path.open("rb") as file:
            for line in file:
                try:
                    record = json.loads(line)
                except (ValueError, RecursionError):
                    continue
                if isinstance(record, dict) and _whole(record.get("step")):
                    yield record
    except FileNotFoundError as error:
        raise BadInput(f"{path}: no such file; give the folder of a run that has trained a step") from error
    except OSError as error:
        raise BadInput(f"{path}: can't be read ({error.strerror})") from error


def _whole(value: Any) -> bool:
    return type(value) is int and 0 <= value < LARGEST_STEP


def _number(value: Any) -> float | None:
    return float(value) if type(value) in (int, float) and abs(value) < LARGEST else None


def _text(path: Path, missing: dict[str, str], about: str) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        missing[path.name] = f"No {about}: the run has no {path.name}, which older versions did not write"
    except OSError as error:
        missing[path.name] = f"No {about}: {path.name} can't be read ({error.strerror})"
    return ""


def _read_config(path: Path, missing: dict[str, str]) -> dict[str, Any]:
    try:
        tree = yaml.safe_load(_text(path, missing, "config"))
    except (yaml.YAMLError, RecursionError, ValueError):
        tree = None
    if not isinstance(tree, dict):
        missing.setdefault(path.name, f"No config: {path.name} holds no YAML keys")
        return {}
    return _flat(tree)


def _flat(tree: dict[Any, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value}
    return flat


def _read_load(path: Path, missing: dict[str, str]) -> Load | None:
    if not path.exists():
        missing[path.name] = (
            f"No map of the experts' load: the run has no {path.name}, which older versions did not write"
        )
        return None
    steps, loads = [], []
    shape: tuple[int, ...] = ()
    for record in _lines(path):
        try:
            load = np.array(record.get("load"), np.float64)
        except (ValueError, TypeError, OverflowError):
            continue
        if load.ndim == 2 and load.size and (np.abs(load) < LARGEST).all() and load.shape == (shape or load.shape):
            shape = load.shape
            steps.append(record["step"])
            loads.append(load)
    if not steps:
        missing[path.name] = f"No map of the experts' load: {path.name} holds no whole line yet"
        return None
    every = np.array(steps, np.int64)
    kept = standing(every)
    return Load(every[kept], np.stack(loads)[kept])


def _read_goodput(
    path: Path, series: dict[str, Series], missing: dict[str, str]
) -> tuple[dict[str, float], int | None]:
    """Seconds by bucket, from goodput.json or else the last metrics; and how often the run was started."""
    try:
        tree = json.loads(_text(path, missing, "account of the time") or "{}")
    except (ValueError, RecursionError):
        tree = {}
    tree = tree if isinstance(tree, dict) else {}
    listed = tree.get("seconds")
    seconds = {name: _number(value) for name, value in listed.items()} if isinstance(listed, dict) else {}
    if not seconds:
        seconds = {name[8:]: one.last for name, one in series.items() if name.startswith("goodput/")}
    kept = {name: value for name, value in seconds.items() if value is not None and value >= 0}
    if sum(kept.values()) > 0:
        missing.pop(path.name, None)
    else:
        missing.setdefault(path.name, f"No account of the time: {path.name} holds none")
        kept = {}
    starts = tree.get("starts")
    return kept, starts if _whole(starts) else None


def _read_events(path: Path, missing: dict[str, str]) -> list[Event] | None:
    lines = _text(path, missing, "events").splitlines()
    if path.name in missing:
        return None
    events = []
    for line in lines:
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(record, dict) and isinstance(record.get("event"), str):
            step, text = record.get("step"), record.get("text", "")
            events.append(
                Event(
                    time=_number(record.get("time")),
                    step=step if _whole(step) else None,
                    kind=record["event"],
                    text=text if isinstance(text, str) else "",
                    about=record,
                )
            )
    return events
