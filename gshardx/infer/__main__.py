"""``python -m gshardx.infer generate | batch | serve --run RUN_DIR ...``, and ``bench --url URL`` for any server."""

import os
import sys

from gshardx.arguments import CommandParser
from gshardx.cli import run_command
from gshardx.infer import batch, bench, generate
from gshardx.infer.options import mesh_of
from gshardx.infer.server import serve
from gshardx.sharding import meeting, simulate_devices
from gshardx.sharding.startup import keep_memory


def main(argv: list[str]) -> int:
    where, rest = meeting.take_flags(argv)
    parser = CommandParser(prog="python -m gshardx.infer", description="Use a trained run.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, module, function, said, more in (
        ("generate", generate, generate.generate, "continue prompts",
         f"The mesh says over how many devices (default: one). {meeting.HELP} Each must be given the same prompts; "
         "process 0 prints."),
        ("batch", batch, batch.batch, "continue prompts of a file",
         "Where it was interrupted, the same command goes on."),
        ("serve", serve, serve.serve, "answer over HTTP, as OpenAI's API",
         "Needs pip install 'gshardx[serve]'. A playground is at /, metrics are at /metrics."),
        ("bench", bench, bench.bench, "measure a server under load",
         "Sends requests at their times, whether others were answered or not."),
    ):  # fmt: skip
        described = f"{said[0].upper()}{said[1:]}. {more}"
        command = commands.add_parser(name, help=said, description=described)
        module.add_arguments(command)
        command.set_defaults(function=function, computes=name != "bench")
    arguments = parser.parse_args(rest)
    if not arguments.computes:
        return arguments.function(arguments)
    if mesh_of(arguments).size == 1:
        keep_memory()
    with meeting.join(*where) as peers:
        simulate_devices(mesh_of(arguments).size, peers.count)
        if peers.index > 0:
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115
        return arguments.function(arguments)


if __name__ == "__main__":
    run_command(main)
