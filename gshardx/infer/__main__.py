"""``python -m gshardx.infer generate | batch | serve --run RUN_DIR ...``, and ``bench --url URL`` for any server."""

import argparse
import os
import sys
from typing import NoReturn

import jax

from gshardx.cli import run_command
from gshardx.errors import BadInput
from gshardx.infer import batch, bench, generate
from gshardx.infer.options import mesh_of
from gshardx.infer.server import serve
from gshardx.sharding import distributed, simulate_devices
from gshardx.sharding.startup import keep_memory


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise BadInput(f"{message} (see {self.prog} --help)")


def main(argv: list[str]) -> int:
    meeting, rest = distributed.take_flags(argv)
    parser = _Parser(prog="python -m gshardx.infer", description="Use a trained run.", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, module, function, said, more in (
        ("generate", generate, generate.generate, "continue prompts",
         f"The mesh says over how many devices (default: one). {distributed.HELP} Each must be given the same prompts; "
         "process 0 prints."),
        ("batch", batch, batch.batch, "continue prompts of a file",
         "Where it was interrupted, the same command goes on."),
        ("serve", serve, serve.serve, "answer over HTTP, as OpenAI's API",
         "Needs pip install 'gshardx[serve]'. A playground is at /, metrics are at /metrics."),
        ("bench", bench, bench.bench, "measure a server under load",
         "Sends requests at their times, whether others were answered or not."),
    ):  # fmt: skip
        described = f"{said[0].upper()}{said[1:]}. {more}"
        command = commands.add_parser(name, help=said, description=described, allow_abbrev=False)
        module.add_arguments(command)
        command.set_defaults(function=function, computes=name != "bench")
    arguments = parser.parse_args(rest)
    if arguments.computes:
        if mesh_of(arguments).size == 1:
            keep_memory()
        simulate_devices(mesh_of(arguments).size, distributed.join(*meeting))
        if jax.process_index() > 0:
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    return arguments.function(arguments)


if __name__ == "__main__":
    run_command(main)
