"""What the scaling study prints: from records (see ``run`` in scaling.py) to tables and goals. Pure functions."""

from collections.abc import Iterator
from typing import Any

from timing import Table, cell, goal

Record = dict[str, Any]

FAMILIES = {
    "gshard": "GShard's models, a decoder of equal layers (configs/gshard)",
    "models": "Public models (configs/models)",
}
"""Titles by folder of configs."""
KINDS = ("parameters", "optimizer", "gradients", "activations", "temporaries")
"""Of a chip's memory in training."""


def table(family: str, records: list[Record]) -> Iterator[str]:
    kinds = " + ".join(KINDS)
    note = f"MB and GB are powers of ten. Memory of a chip at its peak, of it {kinds}; all-to-all: what a chip sends; "
    note += "others: other programs' share of the CPU meanwhile."
    return Table(FAMILIES[family], [row(record) for record in records], [note]).markdown()


def row(record: Record) -> dict[str, Any]:
    """One case; cells are empty where the compiler gave no figure."""
    plan = record["plan"] or {}
    memory = plan.get("memory") or {}
    mesh = " x ".join(f"{axis} {size}" for axis, size in record["mesh"].items())
    return {
        "model": record["config"].split("/")[1],
        "parameters": scaled(plan.get("parameters"), 1e9, " B"),
        "chips": record["chips"],
        "mesh": mesh,
        "fits": fits(record),
        "lower s": plan.get("lower_seconds"),
        "compile s": plan.get("compile_seconds"),
        "HLO instructions": plan.get("hlo_instructions"),
        "program MB": scaled(plan.get("program_bytes"), 1e6),
        "memory GB": scaled(memory.get("peak"), 1e9),
        "of it": " + ".join(cell(scaled(memory.get(kind), 1e9)) or "?" for kind in KINDS) if memory else "",
        "all-to-all MB a layer": scaled(plan.get("all_to_all_bytes_per_layer"), 1e6),
        "predicted step s": plan.get("predicted_step_seconds"),
        "MFU at most": percent(plan.get("mfu_bound")),
        "planner s": record["planner_seconds"],
        "of CPU": record["planner_cpu_seconds"],
        "planner GB": record["planner_peak_bytes"] / 1e9,
        "others": record["others"],
    }


def fits(record: Record) -> str:
    if record["plan"] is None:
        return f"no plan: {record['error']}"
    return "yes" if record["plan"]["fits"] else "does not fit"


def scaled(value: float | None, unit: float, suffix: str = "") -> Any:
    if value is None:
        return None
    return f"{cell(value / unit)}{suffix}" if suffix else value / unit


def percent(value: float | None) -> str | None:
    return None if value is None else f"{value:.0%}"


def goals(records: list[Record]) -> Iterator[str]:
    """The study's goals, each with what it is and whether it is reached."""
    for family in FAMILIES:
        mine = [record for record in records if record["config"].startswith(f"{family}/")]
        if mine:
            yield flat_instructions(family, mine)
            yield flat_compile_time(family, mine)
    yield flat_memory(records)
    yield largest_in_time(records)


def flat_instructions(family: str, records: list[Record]) -> str:
    """HLO instructions over the numbers of chips that a config fits on: the config where they differ most."""
    spreads = {}
    found = figures([record for record in records if (record["plan"] or {}).get("fits")], "hlo_instructions")
    for config, by_chips in found.items():
        if len(by_chips) > 1:
            fewest = min(by_chips.values())
            spreads[config] = 100 * (max(by_chips.values()) - fewest) / fewest
    what = f"HLO instructions of {family}, most over fewest among numbers of chips, differ by"
    if not spreads:
        return f"goal: {what} at most 1 %; not measured: no config fits on two numbers of chips"
    worst = max(spreads, key=lambda config: spreads[config])
    within = sum(spread <= 1 for spread in spreads.values())
    counts = ", ".join(f"{n:,} on {c:,}" for c, n in found[worst].items())
    line = goal(what, spreads[worst], 1, unit=" %")
    return f"{line} (worst: {worst}: {counts} chips; {within} of {len(spreads)} configs within)"


def flat_compile_time(family: str, records: list[Record]) -> str:
    """Compile seconds at 2,048 chips over those at 8: the config where they differ most."""
    found = figures(records, "compile_seconds")
    ratios = {config: one[2048] / one[8] for config, one in found.items() if 8 in one and 2048 in one}
    what = f"compile time of {family} for 2,048 chips over that for 8"
    if not ratios:
        return f"goal: {what} at most 1.5 x; not measured: no config was compiled for both"
    worst = max(ratios, key=lambda config: ratios[config])
    within = sum(ratio <= 1.5 for ratio in ratios.values())
    on_cpu = {r["chips"]: r["planner_cpu_seconds"] for r in records if r["config"].endswith(f"/{worst}")}
    seconds = (
        f"{found[worst][8]:.0f} s and {found[worst][2048]:.0f} s; of CPU {on_cpu[8]:.0f} s and {on_cpu[2048]:.0f} s"
    )
    return f"{goal(what, ratios[worst], 1.5)} (worst: {worst}: {seconds}; {within} of {len(ratios)} configs within)"


def flat_memory(records: list[Record]) -> str:
    """Memory of a chip with 12 layers and as many chips as experts: 2,048 over 128."""
    peaks = {
        record["experts"]: record["plan"]["memory"]["peak"]
        for record in records
        if record["config"].startswith("gshard/")
        and record["layers"] == 12
        and record["chips"] == record["experts"]
        and record["plan"]
        and (record["plan"]["memory"] or {}).get("peak")
    }
    what = "memory of a chip, 12 layers, chips = experts, grows from 128 to 2,048 experts by"
    if not {128, 2048} <= peaks.keys():
        return f"goal: {what} at most 10 % (the paper: 17 %); not measured: both cases are needed"
    gigabytes = ", ".join(f"{peaks[experts] / 1e9:.2f} GB with {experts:,}" for experts in sorted(peaks))
    return f"{goal(what, 100 * (peaks[2048] / peaks[128] - 1), 10, unit=' %')} ({gigabytes}; the paper: 17 %)"


def largest_in_time(records: list[Record]) -> str:
    """The whole planner on GShard's 600B for 2,048 chips."""
    what = "600B planned for 2,048 chips in"
    for record in records:
        if (record["config"], record["chips"]) == ("gshard/36l_2048e", 2048) and record["plan"]:
            line = goal(what, record["planner_seconds"], 120, unit=" s")
            memory = (
                f"{record['planner_cpu_seconds']:.0f} s of CPU, {record['planner_peak_bytes'] / 1e9:.1f} GB of memory"
            )
            return f"{line} ({memory}, {record['cores']} cores, of which others used {record['others']})"
    return f"goal: {what} at most 120 s; not measured"


def figures(records: list[Record], name: str) -> dict[str, dict[int, float]]:
    """A fact of the plans, by config (without its folder) and chips; plans without it are left out."""
    found: dict[str, dict[int, float]] = {}
    for record in records:
        value = (record["plan"] or {}).get(name)
        if value is not None:
            found.setdefault(record["config"].split("/")[1], {})[record["chips"]] = value
    return found
