"""``python -m gshardx.infer generate | batch --run RUN_DIR ...``, once, or once a process"""

import argparse
import os
import sys
from typing import NoReturn

import jax

from gshardx.cli import run_command
from gshardx.errors import BadInput
from gshardx.infer import batch, generate
from gshardx.infer.options import mesh_of
from gshardx.sharding import distributed, simulate_devices
from gshardx.sharding.startup import keep_memory

COMMANDS = {"generate": generate.generate, "batch": batch.batch}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise BadInput(f"{message} (see {self.prog} --help)")


def main(argv: list[str]) -> int:
    meeting, rest = distributed.take_flags(argv)
    parser = _Parser(prog="python -m gshardx.infer", description="Use a trained run.", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    described = f"""Continue prompts; the mesh says over how many devices (default: one). {distributed.HELP} Each must
    be given the same prompts; process 0 prints."""
    generate.add_arguments(
        commands.add_parser("generate", help="continue prompts", description=described, allow_abbrev=False)
    )
    described = "Continue many prompts from a file. Where it was interrupted, the same command goes on."
    batch.add_arguments(
        commands.add_parser("batch", help="continue prompts of a file", description=described, allow_abbrev=False)
    )
    arguments = parser.parse_args(rest)
    if mesh_of(arguments).size == 1:
        keep_memory()
    simulate_devices(mesh_of(arguments).size, distributed.join(*meeting))
    if jax.process_index() > 0:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    return COMMANDS[arguments.command](arguments)


if __name__ == "__main__":
    run_command(main)
