"""Where the seconds of a run went: one bar, and a table that is its legend."""

from collections.abc import Sequence

from gshardx.report.read import Run
from gshardx.report.text import DASH, duration, escape, percent

WORDS = {
    "step": "training steps",
    "compile": "compiling",
    "data_wait": "waiting for data",
    "evaluation": "evaluation",
    "checkpoint_stall": "saving checkpoints",
    "init": "starting",
    "restore": "restoring",
    "lost_work": "lost work",
}


def goodput(runs: Sequence[Run]) -> str:
    """ "" where no run has told its seconds."""
    told = [(index, run) for index, run in enumerate(runs) if run.goodput]
    if not told:
        return ""
    bars = "".join(_bar(run, index if len(runs) > 1 else None) for index, run in told)
    names = list(dict.fromkeys(name for _, run in told for name in run.goodput))
    names.sort(key=lambda name: -max(_share(run, name) for _, run in told))
    heads = "".join(
        f'<th scope="col" class="number">{_whose(run, index, len(runs))}</th><th scope="col" class="number">share</th>'
        for index, run in told
    )
    rows = "".join(
        f'<tr><th scope="row"><i class="swatch" style="background:{_colour(name)}"></i>{_word(name)}</th>'
        + "".join(
            f'<td class="number">{duration(run.goodput[name]) if name in run.goodput else DASH}</td>'
            f'<td class="number">{percent(_share(run, name))}</td>'
            for _, run in told
        )
        + "</tr>"
        for name in names
    )
    return (
        '<section class="card half"><h3>Where the time went <small>all starts of the run together</small></h3>'
        f'{bars}<div class="scroll"><table class="narrow"><thead><tr><th scope="col">spent on</th>{heads}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div></section>"
    )


def _bar(run: Run, index: int | None) -> str:
    segments, start = [], 0.0
    for name, seconds in sorted(run.goodput.items(), key=lambda one: -one[1]):
        share = _share(run, name)
        said = f"{_word(name)}: {duration(seconds)}, {percent(share)}"
        segments.append(
            f'<rect x="{1000 * start:.2f}" width="{1000 * share:.2f}" height="10" style="fill:{_colour(name)}">'
            f"<title>{said}</title></rect>"
        )
        start += share
    said = ", ".join(f"{_word(name)} {percent(_share(run, name))}" for name in run.goodput)
    chip = "" if index is None else f'<p class="bar-name"><span class="chip r{index}">{escape(run.name)}</span></p>'
    return (
        f'{chip}<svg class="bar" viewBox="0 0 1000 10" preserveAspectRatio="none" role="img" '
        f'aria-label="Time of {escape(run.name)}: {said}">{"".join(segments)}</svg>'
    )


def _whose(run: Run, index: int, runs: int) -> str:
    return "time" if runs == 1 else f'<span class="chip r{index}">{escape(run.name)}</span>'


def _share(run: Run, name: str) -> float:
    return run.goodput.get(name, 0.0) / sum(run.goodput.values())


def _word(name: str) -> str:
    return WORDS.get(name) or escape(name.replace("_", " "))


def _colour(name: str) -> str:
    return f"var(--time-{list(WORDS).index(name)})" if name in WORDS else "var(--muted)"
