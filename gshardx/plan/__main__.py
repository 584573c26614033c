"""``python -m gshardx.plan --config FILE --topology NAME [--section.field VALUE ...]``"""

import argparse
import difflib
import json
from pathlib import Path

import jax

from gshardx.arguments import CommandParser
from gshardx.cli import parse_config, run_command
from gshardx.config import Config
from gshardx.errors import BadInput
from gshardx.models.decoder import check_model
from gshardx.plan.estimate import advice
from gshardx.plan.limits import read_limits
from gshardx.plan.plots import check_plot, plot
from gshardx.plan.program import STEPS, Serving
from gshardx.plan.report import make_plan
from gshardx.plan.search import search
from gshardx.plan.show import show
from gshardx.plan.topology import open_topology, prepare
from gshardx.sharding import describe

PROG = "python -m gshardx.plan"
DESCRIPTION = """Compile a config for a topology that need not be here, and say whether it fits, what it sends and how
long it should take. Any key of the config can follow as --section.field VALUE (python -m gshardx.train --help lists
them); the product of mesh.* is the number of devices. Exit codes: 0 done, 2 bad input, 3 a limit of --budget is broken,
4 it does not fit."""
BROKEN, TOO_LARGE = 3, 4


def main(argv: list[str]) -> int:
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    _check_flags(parser, rest)
    config, _ = parse_config(PROG, DESCRIPTION, [f"--config={arguments.config}", *rest])
    check_model(config.model)
    _check_combination(arguments)
    limits = read_limits(arguments.budget) if arguments.budget else None
    if arguments.plot:
        check_plot(arguments.plot)
    jax.config.update("jax_enable_compilation_cache", False)  # or a second plan would time the cache
    prepare(arguments.topology)
    topology = open_topology(arguments.topology, arguments.slices)
    serving = _serving(arguments, config)
    if arguments.search:
        found = search(config, topology, say=None if arguments.json else print)
        print(json.dumps(found.as_json(), indent=1) if arguments.json else found)
        return 0 if found.winner else TOO_LARGE
    plan, compiled = make_plan(config, topology, arguments.step, serving)
    breaches = limits.breaches(plan) if limits else []
    mends = advice(config, topology, plan, serving)
    if arguments.json:
        table = [row.as_json() for row in describe(compiled.inputs.parameters).rows]
        print(json.dumps(plan.as_json() | {"breaches": breaches, "advice": mends, "parameter_table": table}, indent=1))
    else:
        show(plan, config, topology, compiled, mends + [f"over budget: {line}" for line in breaches])
    if arguments.plot:
        plot(plan, arguments.plot)
    if not plan.fits:
        return TOO_LARGE
    return BROKEN if breaches else 0


def _parser() -> CommandParser:
    parser = CommandParser(prog=PROG, description=DESCRIPTION)
    parser.add_argument("--config", required=True, type=Path, metavar="FILE", help="YAML file of a run")
    parser.add_argument(
        "--topology",
        required=True,
        metavar="NAME",
        help="cpu:8 (simulated), local (what is here), v4|v5e|v5p|v6e|tpu7x:AxB[xC], a100|h100|h200|b200:[HOSTSx]GPUS",
    )
    parser.add_argument("--slices", type=int, default=1, metavar="N", help="TPU slices (default 1)")
    parser.add_argument("--step", choices=STEPS, default="train", help="what is compiled (default train)")
    parser.add_argument("--rows", type=int, metavar="N", help="sequences of prefill and decode (train.batch_size)")
    parser.add_argument("--length", type=int, metavar="N", help="tokens a row's cache holds (data.sequence_length)")
    parser.add_argument("--chunk", type=int, default=64, metavar="N", help="prompt tokens in one prefill (default 64)")
    parser.add_argument("--json", action="store_true", help="the same facts as JSON")
    parser.add_argument(
        "--search", action="store_true", help="rank meshes, rematerialisation, batches and capacities; compile the best"
    )
    parser.add_argument("--budget", type=Path, metavar="FILE", help="limits that the plan must keep (docs/planner.md)")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw memory and time to a PNG or SVG (matplotlib)")
    return parser


def _check_flags(parser: CommandParser, rest: list[str]) -> None:
    """Raise BadInput for a flag that is nearer to one of the planner's than to a key of the config."""
    ours = [option for action in parser._actions for option in action.option_strings]
    for flag in (text.split("=")[0] for text in rest):
        nearest = difflib.get_close_matches(flag, ours, n=1, cutoff=0.7)
        if flag.startswith("--") and "." not in flag and nearest:
            raise BadInput(f"unknown flag {flag}; did you mean {nearest[0]}?")


def _check_combination(arguments: argparse.Namespace) -> None:
    """Raise BadInput for flags of one plan beside ``--search``, which ranks many training steps."""
    if arguments.search:
        for name, given in (
            ("budget", arguments.budget),
            ("plot", arguments.plot),
            ("step", arguments.step != "train"),
        ):
            if given:
                raise BadInput(f"--{name} is for one plan and --search ranks training steps; plan the winner with it")


def _serving(arguments: argparse.Namespace, config: Config) -> Serving:
    rows = config.train.batch_size if arguments.rows is None else arguments.rows
    length = config.data.sequence_length if arguments.length is None else arguments.length
    for name, value in (("slices", arguments.slices), ("rows", rows), ("length", length), ("chunk", arguments.chunk)):
        if value < 1:
            raise BadInput(f"--{name} {value}: must be 1 or more")
    return Serving(rows, length, min(arguments.chunk, length))


if __name__ == "__main__":
    run_command(main)
