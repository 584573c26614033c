"""What the parts of a Mixture-of-Experts layer cost on this machine's CPU, beside their alternatives.

    python benchmarks/moe_layer.py                   # every part, each in a process of its own
    python benchmarks/moe_layer.py --part dispatch   # one table
    python benchmarks/moe_layer.py --part memory --json

Candidates take turns within a process; times are medians over rounds, ratios medians of the ratios within a round.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from functools import partial

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # before JAX is imported

import crossover
import jax
import jax.numpy as jnp
from alternatives import argmax_rounds, one_hot_slots
from layers import Call, Case, Subject, bare_experts, dense, moe
from report import Machine
from timing import Seconds, Table, goal, median_ms, ratio, take_turns

from gshardx.layers import Einsum, Gather
from gshardx.layers.routing.choice import assign_slots, top_k
from gshardx.layers.routing.statistics import count
from gshardx.sharding import MeshConfig, build_mesh, simulate_devices


def dispatch(args: argparse.Namespace) -> Table:
    """Both slot dispatchers and the experts alone, on eight devices."""
    mesh = build_mesh(MeshConfig(expert=8))
    rows, notes = [], []
    for activation in ("swiglu", "relu"):
        case = sized(Case(groups=8, tokens=1024, width=512, hidden=1024, experts=8, activation=activation), args)
        subjects = {
            "einsum": moe(case, Einsum(), mesh),
            "gather": moe(case, Gather(), mesh),
            "experts alone": bare_experts(case, mesh),
        }
        seconds, dropped = both_ways(subjects, args.rounds), drop_percent(subjects["gather"])
        for name in subjects:
            row = {"activation": activation, "candidate": name, **times(seconds, name, "experts alone")}
            rows.append(row | {"dropped %": None if name == "experts alone" else dropped})
        faster = ratio(seconds, "einsum fwd+bwd", "gather fwd+bwd")
        notes.append(goal(f"{activation}: einsum over gather, fwd+bwd,", faster, 2, at_least=True))
        notes.append(goal(f"{activation}: gather over experts alone, fwd+bwd,", rows[-2]["fwd+bwd x"], 1.3))
        notes.append(goal(f"{activation}: gather over experts alone, fwd,", rows[-2]["fwd x"], 1.3))
    return Table(f"Dispatch: 8 simulated devices, {case.letters()}; x: over the experts alone", rows, notes)


def dense_network(args: argparse.Namespace) -> Table:
    """The layer against one dense network that does as many FLOPs with each token."""
    mesh = build_mesh(MeshConfig())
    case = sized(Case(groups=4, tokens=1024, width=512, hidden=1024, experts=8), args)
    subjects = {"MoE, gather": moe(case, Gather(), mesh), "dense": dense(case, mesh)}
    seconds = both_ways(subjects, args.rounds)
    rows = [{"candidate": name, **times(seconds, name, "dense")} for name in subjects]
    hidden = case.dense().w_down.shape[0]
    note = goal("MoE over dense, fwd+bwd,", rows[0]["fwd+bwd x"], 1.25)
    return Table(f"One device against a dense network of {hidden:,} hidden units, {case.letters()}", rows, [note])


def choice(args: argparse.Namespace) -> Table:
    """Choosing experts and slots with many experts, as a share of the layer's forward pass."""
    case = sized(Case(groups=1, tokens=4096, width=512, hidden=1024, experts=512), args)
    forward = moe(case, Gather(), build_mesh(MeshConfig())).ready(backward=False)
    logits = jax.random.normal(jax.random.key(0), (1, case.tokens, case.experts))
    experts = top_k(logits, case.top_k)
    wanted = jnp.ones(experts.shape, bool)
    e = case.experts
    alternatives: dict[str, tuple[Callable[..., object], tuple[jax.Array, ...]]] = {
        "slots: assign_slots (sort)": (lambda x, y: assign_slots(x, y, e), (experts, wanted)),
        "slots: cumulative sum of one-hots": (lambda x, y: one_hot_slots(x, y, e), (experts, wanted)),
    }
    for k in (2, 8):
        alternatives |= {
            f"{k} experts: top_k (rounds of max)": (partial(top_k, k=k), (logits,)),
            f"{k} experts: rounds of jnp.argmax": (partial(argmax_rounds, k=k), (logits,)),
            f"{k} experts: jax.lax.top_k": (partial(jax.lax.top_k, k=k), (logits,)),
        }
    calls: dict[str, Call] = {"layer forward": forward}
    for name, (function, inputs) in alternatives.items():
        calls[name] = partial(jax.jit(function), *inputs)
    seconds = take_turns(calls, args.rounds)
    rows = [
        {"candidate": name, "ms": median_ms(seconds, name), "% of layer": 100 * ratio(seconds, name, "layer forward")}
        for name in calls
    ]
    note = goal("slot assignment", rows[1]["% of layer"], 3, unit=" % of the layer's forward pass")
    return Table(f"Choice: one device, {case.letters()}", rows, [note])


def memory(args: argparse.Namespace) -> Table:
    """Temporary bytes of forward and backward, as XLA plans them; nothing is allocated or run."""
    mesh = build_mesh(MeshConfig())
    rows = []
    for tokens in (16, 64) if args.small else (1024, 4096, 16384):
        case = Case(groups=1, tokens=tokens, width=256, hidden=256, experts=8)
        row = {"s": tokens}
        for name, dispatcher in (("gather", Gather()), ("einsum", Einsum())):
            executable = moe(case, dispatcher, mesh).compiled(backward=True).executable
            size = executable.memory_analysis().temp_size_in_bytes
            row[f"{name} MB"] = size / 1e6
            row[f"{name} bytes / (s k m 4)"] = size / (tokens * case.top_k * case.width * 4)
        rows.append(row)
    growth = rows[-1]["gather bytes / (s k m 4)"] / rows[0]["gather bytes / (s k m 4)"]
    title = f"Memory of fwd+bwd besides arguments and results: one device, one group, {case.letters('ekmh')}"
    return Table(title, rows, [goal("gather's bytes a choice, longest group over shortest,", growth, 1.1)])


def crossing(args: argparse.Namespace) -> Table:
    return crossover.table(args.rounds, args.small)


def stats(args: argparse.Namespace) -> Table:
    """What router statistics cost: the layer with and without them, and their function alone."""
    rows = []
    for devices in (1, 8):
        mesh = build_mesh(MeshConfig(expert=devices))
        case = sized(Case(groups=8, tokens=1024, width=512, hidden=1024, experts=8), args)
        calls = {"with": True, "without": False}
        calls = {name: moe(case, Gather(), mesh, metrics=on).ready(backward=True) for name, on in calls.items()}
        seconds = take_turns({**calls, "alone": statistics_alone(case)}, 2 * args.rounds)
        rows.append({
            "devices": devices,
            "layer fwd+bwd ms": median_ms(seconds, "without"),
            "with - without, % of layer": 100 * (ratio(seconds, "with", "without") - 1),
            "spread of that, %": 100 * spread(seconds, "with", "without"),
            "count() alone, one device, ms": median_ms(seconds, "alone"),
            "% of layer": 100 * ratio(seconds, "alone", "without"),
        })  # fmt: skip
    note = goal("count() alone", max(row["% of layer"] for row in rows), 1, unit=" % of the layer's fwd+bwd")
    more = "a train step is longer than its layers' fwd+bwd, so these shares are upper bounds for those of a step"
    return Table(f"Router statistics, {case.letters()}", rows, [note, more])


def statistics_alone(case: Case) -> Call:
    logits = jax.random.normal(jax.random.key(0), (case.groups, case.tokens, case.experts))
    valid = jnp.ones(logits.shape[:2], bool)
    experts = top_k(logits, case.top_k)
    chosen = jnp.ones(experts.shape, bool)
    slots, load = assign_slots(experts, chosen, case.experts)
    gates = jax.nn.softmax(logits)
    counted = jax.jit(count, static_argnums=6)
    return lambda: counted(logits, gates, chosen, slots < case.slots, load, valid, case.slots)


def spread(seconds: Seconds, name: str, other: str) -> float:
    """Between the quartiles of the ratio within a round."""
    ratios = [a / b for a, b in zip(seconds[name], seconds[other], strict=True)]
    low, _, high = statistics.quantiles(ratios, n=4)
    return high - low


def both_ways(subjects: dict[str, Subject], rounds: int) -> Seconds:
    """Each candidate forward, and forward and backward."""
    calls = {name: one.ready(backward=False) for name, one in subjects.items()}
    calls |= {f"{name} fwd+bwd": one.ready(backward=True) for name, one in subjects.items()}
    return take_turns(calls, rounds)


def times(seconds: Seconds, name: str, other: str) -> dict[str, float]:
    both = f"{name} fwd+bwd"
    return {
        "fwd ms": median_ms(seconds, name),
        "fwd+bwd ms": median_ms(seconds, both),
        "fwd x": ratio(seconds, name, other),
        "fwd+bwd x": ratio(seconds, both, f"{other} fwd+bwd"),
    }


def drop_percent(layer: Subject) -> float:
    _, metrics = layer.ready(backward=False)()
    return 100 * float(metrics.stats.drop_fraction)


def sized(case: Case, args: argparse.Namespace) -> Case:
    return case.small() if args.small else case


PARTS = {
    "dispatch": dispatch,
    "dense": dense_network,
    "choice": choice,
    "memory": memory,
    "crossover": crossing,
    "stats": stats,
}
DEVICES = {"dispatch": 8, "stats": 8}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=["all", *PARTS], default="all")
    parser.add_argument("--json", action="store_true", help="one JSON object a part instead of a table")
    parser.add_argument("--rounds", type=int, default=5, help="how often each candidate has its turn")
    parser.add_argument(
        "--small", action="store_true", help="tiny shapes: checks that the script runs, measures nothing"
    )
    args = parser.parse_args()
    if args.part == "all":
        commands = [[sys.executable, __file__, *sys.argv[1:], "--part", part] for part in PARTS]
        return max(subprocess.run(command, check=False).returncode for command in commands)
    simulate_devices(DEVICES.get(args.part, 1))
    machine = Machine()
    table = PARTS[args.part](args)
    if args.small:
        table = table._replace(notes=["small shapes: checks that the script runs, measures nothing"])
    if args.json:
        print(json.dumps({"part": args.part, **table._asdict(), "machine": str(machine)}))
    else:
        print("\n".join(table._replace(notes=[*table.notes, str(machine)]).markdown()), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
