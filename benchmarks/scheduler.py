"""Microseconds that the host takes to plan a call and fill its buffer: no device takes part.

python benchmarks/scheduler.py            # 64 sequences that write, prompts among them, then with guesses
"""

import argparse
import statistics
import time

import numpy as np
from timing import Table, goal

from gshardx.infer.drafts import PromptLookup
from gshardx.infer.fill import fill_decode, fill_step
from gshardx.infer.program import Sizes, decode_layout, step_layout
from gshardx.infer.request import SamplingParams
from gshardx.infer.scheduler import Plan, Scheduler, Sequence
from gshardx.infer.slots import SlotTables

LIMIT = 200
"""Microseconds, of issue 6."""
LENGTH = 2048


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--calls", type=int, default=400)
    args = parser.parse_args()
    found = {
        "all write": microseconds(args.rows, args.calls, 0, False),
        "a prompt among them": microseconds(args.rows - 1, args.calls, 1, False),
        "prompt lookup of all": microseconds(args.rows, args.calls, 0, True),
    }
    rows = [
        {"calls": name, "median us": statistics.median(each), "90 % us": float(np.quantile(each, 0.9))}
        for name, each in found.items()
    ]
    print("\n".join(Table(f"Planning and filling a call of {args.rows} sequences", rows).markdown()))
    print("- " + goal(f"a step at {args.rows} rows", statistics.median(found["all write"]), LIMIT, unit=" us"))


def microseconds(writing: int, calls: int, prompts: int, guess: bool) -> list[float]:
    """Of each call: plan, tables, buffer, commit."""
    slots = writing + prompts
    sizes = Sizes(1, slots, slots * LENGTH // 64 + 1, 64, LENGTH, 32, 1)
    scheduler = Scheduler(shards=1, slots=slots, pages=sizes.pages, page_size=64, budget=256, scores=64)
    tables, lookup = SlotTables(sizes), PromptLookup()
    step, decode = step_layout(sizes, 256, slots), decode_layout(sizes, slots)
    draw = np.random.default_rng(0)

    def add(prompt: int) -> None:
        tokens = np.zeros(LENGTH, np.int32)
        tokens[:prompt] = draw.integers(0, 1000, prompt)
        scheduler.add(Sequence(tokens, prompt, None, 0, known=prompt))

    for _ in range(writing):
        add(100)
    while any(one.todo > 1 for one in scheduler.running) or scheduler.waiting:
        plan = scheduler.plan(1)
        scheduler.commit(plan)
        took_in(plan)
    for _ in range(prompts):
        add(LENGTH - 600)
    found = []
    for _ in range(calls):
        start = time.perf_counter()
        if guess:
            for one in scheduler.running:
                lookup.available(one, 7)
        plan = scheduler.plan(1)
        for segment in plan.segments[0]:
            if not tables.holds(segment.sequence):
                tables.install(segment.sequence, SamplingParams(), 0, frozenset({0}))
            tables.refresh(segment.sequence)
        layout = step if any(one.length > 1 for one in plan.segments[0]) else decode
        given = layout.views(np.zeros(layout.words, np.int32))
        (fill_step if layout is step else fill_decode)(given, plan, tables, sizes)
        scheduler.commit(plan)
        found.append(1e6 * (time.perf_counter() - start))
        took_in(plan)
    return found


def took_in(plan: Plan) -> None:
    for sequence, *_ in plan.segments[0]:
        if sequence.pending:
            sequence.tokens[sequence.known] = sequence.known % 997
            sequence.known, sequence.pending = sequence.known + 1, 0


if __name__ == "__main__":
    main()
