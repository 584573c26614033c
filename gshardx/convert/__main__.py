"""``python -m gshardx.convert --from DIR --to DIR``: public checkpoints in and out; with a command: other experts."""

import argparse
from pathlib import Path

import jax

from gshardx.arguments import CommandParser
from gshardx.checkpoint.arrays import FLOATS
from gshardx.cli import run_command
from gshardx.convert.command import COMMANDS
from gshardx.convert.command import main as change_experts
from gshardx.convert.families import FAMILIES
from gshardx.convert.hub import fetched
from gshardx.convert.incoming import convert_in
from gshardx.convert.outgoing import DTYPES, LARGEST, convert_out
from gshardx.convert.planned import write_plan
from gshardx.convert.traces import import_transformers
from gshardx.convert.verify import TOKENS, Verdict, report, verify, verify_run
from gshardx.errors import BadInput

DESCRIPTION = f"""Read a public checkpoint (a directory with config.json and safetensors files) into a run directory for
gshardx.infer and gshardx.train, or write one from a run directory; what DIR holds says which. Architectures:
{", ".join(FAMILIES)}. Or change the experts of a run: {", ".join(COMMANDS)} (each
has --help). Exit codes: 0 done, 1 --verify found a difference, 2 bad input."""
PUBLIC, RUN = "config.json", "config.yaml"
"""What tells a public model's directory, and a run's."""


def main(argv: list[str]) -> int:
    jax.config.update("jax_platforms", "cpu")  # little is computed
    if argv and argv[0] in COMMANDS:
        return change_experts(argv)
    given = _parser().parse_args(argv)
    _check_flags(given)
    if given.plan is not None:
        write_plan(fetched(given.source, given.revision, ["config.json"]), given.plan)
        return 0
    given.source = fetched(given.source, given.revision)
    is_run = (given.source / RUN).is_file()
    there = given.verify and given.target is not None and (given.target / (PUBLIC if is_run else RUN)).is_file()
    _check_source(given, is_run, there)
    if given.verify:
        import_transformers()  # or a conversion would come before the line that it is missing
    if given.target is not None and not there:
        _convert(given, is_run)
    return report(_verified(given, is_run), given.json) if given.verify else 0


def _verified(given: argparse.Namespace, is_run: bool) -> Verdict:
    if given.target is None and is_run:
        return verify_run(given.source, given.tokens, given.step)
    theirs = given.target if is_run else given.source
    ours = given.source if is_run else given.target or given.source
    return verify(ours, theirs, given.tokens, given.step)


def _parser() -> CommandParser:
    parser = CommandParser(prog="python -m gshardx.convert", description=DESCRIPTION)
    parser.add_argument(
        "--from", dest="source", required=True, metavar="DIR", help="what to read; or ORG/NAME[@REVISION] on the hub"
    )
    parser.add_argument("--revision", metavar="REV", help="on the hub: a branch, tag or commit")
    parser.add_argument(
        "--to", dest="target", type=Path, metavar="DIR", help="what to write; not there, unless to --verify it alone"
    )
    parser.add_argument("--dtype", choices=DTYPES, help="of the weights there (default: as they are)")
    parser.add_argument("--step", type=int, metavar="N", help="of the run (default: the newest)")
    parser.add_argument(
        "--shard_size",
        type=float,
        metavar="GB",
        help=f"of a safetensors file (default: the files that the weights came in, else {LARGEST / 1e9:.0f})",
    )
    parser.add_argument(
        "--verify",
        action="store_true",
        help="run ours and transformers' on the same tokens, and compare; without --to, or with one that is there, "
        "nothing is written",
    )
    parser.add_argument("--tokens", type=int, default=TOKENS, metavar="N", help=f"to --verify on (default {TOKENS})")
    parser.add_argument(
        "--plan",
        type=Path,
        metavar="FILE",
        help="write the config of such a model for gshardx.plan, and say how many parameters it has; reads no weights, "
        "and DIR may be a config.json",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="where --verify writes its numbers")
    return parser


def _check_flags(given: argparse.Namespace) -> None:
    """Raise BadInput for flags that go with no source."""
    if given.plan is not None and (given.target is not None or given.verify):
        raise BadInput(f"--plan {given.plan}: reads no weights, and --to and --verify do; leave them out")
    if given.target is None and not given.verify and given.plan is None:
        raise BadInput("--to is missing: give a directory to write (or --verify, to compare --from with transformers)")
    if given.json is not None and not given.verify:
        raise BadInput(f"--json {given.json}: is for the numbers of --verify; give both")
    if given.json is not None and not given.json.parent.is_dir():
        raise BadInput(f"--json {given.json}: no directory {given.json.parent}; make it first")
    if given.tokens < 1:
        raise BadInput(f"--tokens {given.tokens}: must be 1 or more")
    if given.shard_size is not None and not given.shard_size > 0:
        raise BadInput(f"--shard_size {given.shard_size}: must be above 0")


def _check_source(given: argparse.Namespace, is_run: bool, there: bool) -> None:
    """Raise BadInput for flags that don't go with the source, or with a target that is ``there``."""
    if (there or given.target is None) and (given.dtype, given.shard_size) != (None, None):
        raise BadInput("--dtype and --shard_size are for what is written, and --verify alone writes nothing")
    if not is_run and not (given.source / PUBLIC).is_file():
        raise BadInput(f"--from {given.source}: neither {PUBLIC} (a public model) nor {RUN} (a run) there")
    if not is_run and given.step is not None:
        raise BadInput(f"--step {given.step}: {given.source} is no run directory, and has no steps; leave it out")
    if not is_run and given.dtype not in (None, *FLOATS):
        raise BadInput(f"--dtype {given.dtype}: run directories have {' or '.join(FLOATS)}")


def _convert(given: argparse.Namespace, is_run: bool) -> None:
    if is_run:
        largest = None if given.shard_size is None else int(given.shard_size * 1e9)
        convert_out(given.source, given.target, given.step, given.dtype, largest)
    else:
        convert_in(given.source, given.target, given.dtype)


if __name__ == "__main__":
    run_command(main)
