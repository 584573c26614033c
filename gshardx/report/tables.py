"""Tables: evaluation by source, events, versions, config."""

import json
from collections.abc import Iterable, Sequence
from typing import Any

from gshardx.report.marks import ROUTINE
from gshardx.report.read import Event, Run
from gshardx.report.text import DASH, TIMES, count, escape, figure, moment, percent

MOST_EVENTS = 200
TOGETHER = ("checkpoint", "skipped_step")
"""Events that one row stands for when they follow each other."""


def sources(runs: Sequence[Run]) -> str:
    """The last evaluation of each source, the hardest first; "" where there is but the whole."""
    names = {name: _bits(runs, name) for run in runs for name in run.sources()}
    if not names:
        return ""
    order = sorted(names, key=lambda name: (-(names[name][0] or -1.0), name))
    longest = max((bits for all_ in names.values() for bits in all_ if bits is not None), default=1.0) or 1.0
    heads = "".join(
        f'<th scope="col">{_chip(runs, index)} bits per byte</th><th scope="col" class="number">loss</th>'
        '<th scope="col" class="number">accuracy</th>'
        for index in range(len(runs))
    )
    rows = "".join(
        f'<tr><th scope="row">{escape(name)}</th>'
        + "".join(_source(run, index, name, longest) for index, run in enumerate(runs))
        + "</tr>"
        for name in order
    )
    return (
        '<section class="card wide"><h3>By source <small>last evaluation, the hardest first</small></h3>'
        f'<div class="scroll"><table><thead><tr><th scope="col">source</th>{heads}</tr></thead><tbody>{rows}</tbody>'
        "</table></div></section>"
    )


def events(runs: Sequence[Run]) -> str:
    """A table for each run, the newest last; checkpoints in a row share a line."""
    tables = []
    for index, run in enumerate(runs):
        groups = _together(run.events or [])
        if not groups:
            continue
        left_out = len(groups) - MOST_EVENTS
        caption = f"{_chip(runs, index)} {f'the last {MOST_EVENTS} of {count(len(groups))}' if left_out > 0 else ''}"
        rows = "".join(_event(group) for group in groups[-MOST_EVENTS:])
        tables.append(
            f'<div class="scroll"><table class="events"><caption>{caption}</caption><thead><tr>'
            '<th scope="col">time, UTC</th><th scope="col" class="number">step</th><th scope="col">event</th>'
            '<th scope="col">what happened</th></tr>'
            f"</thead><tbody>{rows}</tbody></table></div>"
        )
    return f'<section class="card wide"><h3>Events</h3>{"".join(tables)}</section>' if tables else ""


def versions(runs: Sequence[Run]) -> str:
    """What each start of a run ran on."""
    rows = []
    for index, run in enumerate(runs):
        starts = [event for event in run.events or [] if event.kind == "start"][-MOST_EVENTS:]
        chip = f"<td>{_chip(runs, index)}</td>" if len(runs) > 1 else ""
        rows += [f"<tr>{chip}{_start(*two)}</tr>" for two in zip(starts, [None, *starts], strict=False)]
    if not rows:
        return ""
    head = "".join(
        f'<th scope="col"{" class=number" if name == "step" else ""}>{name}</th>'
        for name in [*["run"] * (len(runs) > 1), "started, UTC", "step", "devices", "processes", "versions", "command"]
    )
    return (
        '<section class="card wide"><h3>Starts and versions</h3><div class="scroll"><table class="versions"><thead><tr>'
        f"{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div></section>"
    )


def config(runs: Sequence[Run]) -> str:
    """All keys, folded; of two runs first the keys that differ."""
    told = [run for run in runs if run.config]
    if not told:
        return ""
    keys = list(dict.fromkeys(key for run in told for key in run.config))
    head = "".join(
        f'<th scope="col">{_chip(runs, index) or "value"}</th>' for index, run in enumerate(runs) if run.config
    )
    parts = []
    if len(told) > 1:
        differ = [key for key in keys if len({_words(run.config.get(key, DASH)) for run in told}) > 1]
        parts.append(f"<h3>Config: what differs <small>{len(differ)} of {len(keys)} keys</small></h3>")
        parts.append(_keys(differ, told, head))
    else:
        parts.append("<h3>Config</h3>")
    parts.append(f"<details><summary>All {len(keys)} keys</summary>{_keys(keys, told, head)}</details>")
    return f'<section class="card wide">{"".join(parts)}</section>'


def _keys(keys: Iterable[str], runs: Sequence[Run], head: str) -> str:
    rows = "".join(
        f'<tr><th scope="row"><code>{escape(key)}</code></th>'
        + "".join(f"<td><code>{escape(_words(run.config.get(key, DASH)))}</code></td>" for run in runs)
        + "</tr>"
        for key in keys
    )
    return (
        f'<div class="scroll"><table class="config"><thead><tr><th scope="col">key</th>{head}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
    )


def _bits(runs: Sequence[Run], source: str) -> list[float | None]:
    return [run.get(f"evaluation/{source}/bits_per_byte").last for run in runs]


def _source(run: Run, index: int, name: str, longest: float) -> str:
    bits, loss, accuracy = (
        run.get(f"evaluation/{name}/{what}").last for what in ("bits_per_byte", "loss", "token_accuracy")
    )
    bar = f'<i class="length r{index}" style="--share:{(bits or 0) / longest:.3f}"></i>'
    return (
        f'<td class="bits"><span>{figure(bits, 3)}</span>{bar}</td><td class="number">{figure(loss, 3)}</td>'
        f'<td class="number">{percent(accuracy)}</td>'
    )


def _together(events: Sequence[Event]) -> list[list[Event]]:
    groups: list[list[Event]] = []
    for event in events:
        if groups and event.kind in TOGETHER and groups[-1][0].kind == event.kind:
            groups[-1].append(event)
        else:
            groups.append([event])
    return groups


def _event(group: Sequence[Event]) -> str:
    first, last = group[0], group[-1]
    steps = [event.step for event in (first, last) if event.step is not None]
    step = DASH.join(dict.fromkeys(map(count, steps)))
    many = f" {TIMES} {len(group):,}" if len(group) > 1 else ""
    kind = "" if first.kind in ROUTINE else ' class="fault"'
    return (
        f'<tr{kind}><td>{moment(last.time)}</td><td class="number">{step}</td>'
        f"<td>{escape(first.kind.replace('_', ' '))}{many}</td><td>{escape(last.text)}</td></tr>"
    )


def _start(event: Event, before: Event | None) -> str:
    """Cells; what is as it was at the start before says so."""
    step = "" if event.step is None else count(event.step)
    said = [_words(event.about.get(name, "")) for name in ("devices", "processes")]
    for name, words in (("versions", _versions), ("command", _command)):
        same = before is not None and event.about.get(name) == before.about.get(name)
        said.append("as before" if same and words(event) else words(event))
    cells = "".join(f"<td>{escape(cell)}</td>" for cell in said)
    return f'<td>{moment(event.time)}</td><td class="number">{step}</td>{cells}'


def _versions(event: Event) -> str:
    found = event.about.get("versions")
    return ", ".join(f"{name} {_words(value)}" for name, value in found.items()) if isinstance(found, dict) else ""


def _command(event: Event) -> str:
    return _words(event.about.get("command", ""))


def _chip(runs: Sequence[Run], index: int) -> str:
    return f'<span class="chip r{index}">{escape(runs[index].name)}</span>' if len(runs) > 1 else ""


def _words(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)
