"""The page: all sections in one file that asks for nothing else."""

from collections.abc import Sequence
from importlib import resources

from gshardx.report import curves
from gshardx.report.charts import Chart, script
from gshardx.report.findings import findings
from gshardx.report.goodput import goodput
from gshardx.report.headline import headline
from gshardx.report.heatmap import heat_maps
from gshardx.report.marks import data, marks_of
from gshardx.report.read import Run
from gshardx.report.tables import config, events, sources, versions
from gshardx.report.text import escape

POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"


def page(runs: Sequence[Run]) -> str:
    """HTML about one run, or about two side by side."""
    name = " and ".join(run.name for run in runs)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}"><link rel="icon" href="data:,">'
        f"<title>{escape(name)}: training report</title><style>{_packaged('page.css')}</style></head>"
        f'<body class="{"two" if len(runs) > 1 else "one"}">'
        f"<header><h1>{_title(runs)}</h1>{_about(runs)}{headline(runs)}</header>"
        f"<main>{_warnings(runs)}{_sections(runs)}</main>"
        f'<div id="reading" hidden></div><script>{_packaged("page.js")}</script></body></html>\n'
    )


def _packaged(name: str) -> str:
    return resources.files("gshardx.report").joinpath(name).read_text(encoding="utf-8")


def _sections(runs: Sequence[Run]) -> str:
    first = min(run.span[0] for run in runs)
    last = max(run.span[1] for run in runs)
    span = (0 if first < last / 5 else first, last)
    marks = marks_of(runs)

    def drawn(*charts: Chart) -> str:
        return "".join(chart.html(span, marks) for chart in charts)

    held_out = drawn(curves.bits_per_byte(runs), curves.token_accuracy(runs)) + sources(runs)
    parts = (
        (
            "Learning",
            drawn(curves.loss(runs)) + (held_out or _note("The run was not evaluated: train.eval_every is 0.")),
        ),
        ("Speed", drawn(curves.throughput(runs)) + goodput(runs) + _missing(runs, "goodput.json")),
        (
            "Experts",
            heat_maps(runs)
            + _missing(runs, "expert_load.jsonl")
            + drawn(curves.drop_rate(runs), curves.router_entropy(runs), curves.busiest_expert(runs)),
        ),
        ("Optimizer", drawn(curves.gradient_norm(runs), curves.learning_rate(runs))),
        (
            "Record",
            events(runs)
            + _missing(runs, "events.jsonl")
            + versions(runs)
            + config(runs)
            + _missing(runs, "config.yaml"),
        ),
    )
    return script({"marks": data(marks), "runs": [run.name for run in runs]}).replace(
        "<script", '<script id="marks"', 1
    ) + ("".join(f"<h2>{title}</h2><div class=cards>{body}</div>" for title, body in parts if body))


def _title(runs: Sequence[Run]) -> str:
    if len(runs) == 1:
        return escape(runs[0].name)
    return " <small>and</small> ".join(
        f'<span class="chip r{i}">{escape(run.name)}</span>' for i, run in enumerate(runs)
    )


def _about(runs: Sequence[Run]) -> str:
    """One line on each model."""
    lines = []
    for run in runs:
        keys = {
            key: run.config.get(f"model.{key}")
            for key in ("layers", "width", "moe.num_experts", "moe.top_k", "moe.router")
        }
        words = [
            f"{keys['layers']} layers of width {keys['width']}" if keys["layers"] and keys["width"] else "",
            f"{keys['moe.num_experts']} experts" if keys["moe.num_experts"] else "",
            f"top {keys['moe.top_k']}" if keys["moe.top_k"] else "",
            f"router {keys['moe.router']}" if keys["moe.router"] else "",
        ]
        said = ", ".join(word for word in words if word)
        lines.append(f"{run.name}: {said}" if len(runs) > 1 and said else said)
    return "".join(f"<p class=about>{escape(line)}</p>" for line in dict.fromkeys(lines) if line)


def _warnings(runs: Sequence[Run]) -> str:
    items = [
        f"<li>{f'<b>{escape(run.name)}</b>: ' if len(runs) > 1 else ''}{escape(line)}</li>"
        for run in runs
        for line in findings(run)
    ]
    return f'<ul class="warnings" aria-label="Warnings">{"".join(items)}</ul>' if items else ""


def _missing(runs: Sequence[Run], file: str) -> str:
    return "".join(
        _note(f"{f'{run.name}: ' if len(runs) > 1 else ''}{run.missing[file]}.") for run in runs if file in run.missing
    )


def _note(text: str) -> str:
    return f"<p class=note>{escape(text)}</p>"
