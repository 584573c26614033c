"""What calls cost on this machine, timed at the start: from it follows how many tokens to guess."""

import time

import jax

from gshardx.infer.depth import Costs
from gshardx.infer.program import Sizes
from gshardx.infer.programs import Call, Programs
from gshardx.models.build import Variables

REPEATS = 3
"""Of each call; the fastest counts."""


def measured_costs(programs: Programs, variables: Variables, sizes: Sizes) -> Costs:
    """Of calls that are as full as they can be, each row a sequence of one page."""
    state = programs.initial_state()

    def seconds(call: Call, fields: dict[str, int]) -> float:
        nonlocal state
        buffer, given = call.blank()
        given["position"][:] = 0
        given["slot"][:] = sizes.slots
        given["longest"][...] = 1
        for name, value in fields.items():
            given[name][...] = value
        found = []
        for _ in range(1 + REPEATS):
            start = time.perf_counter()
            state, result = call(variables, state, buffer)
            jax.block_until_ready(result)
            found.append(time.perf_counter() - start)
        return min(found[1:])

    def a_token(calls: dict[int, Call]) -> dict[int, float]:
        fields = {"steps": sizes.steps, "limit": sizes.steps}
        return {rows: seconds(call, fields) / sizes.steps for rows, call in calls.items()}

    plain, drafts = a_token(programs.decodes), a_token(programs.drafts)
    checks: dict[int, tuple[int, float, float]] = {}
    for count, call in programs.steps.items():
        tile = min(sizes.tile, count)
        one, all_ = (
            seconds(call, {"tiles": tiles, "sample_tiles": 1, "sample_slot": sizes.slots})
            for tiles in (1, count // tile)
        )
        checks[count] = tile, one, (all_ - one) / max(1, count // tile - 1)

    def check(tokens: int) -> float:
        tile, first, each = checks[min(count for count in checks if count >= min(tokens, max(checks)))]
        return first + each * (-(-tokens // tile) - 1)

    return Costs(
        plain=lambda rows: plain[min(count for count in plain if count >= rows)],
        check=check,
        draft=lambda rows: drafts[min(count for count in drafts if count >= rows)] if drafts else 0.0,
    )
