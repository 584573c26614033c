"""``python -m gshardx.infer generate --run RUN_DIR --prompt TEXT``, once, or once a process"""

import argparse
import os
import sys
from typing import NoReturn

import jax

from gshardx.cli import run_command
from gshardx.errors import BadInput
from gshardx.infer import generate
from gshardx.sharding import distributed, simulate_devices


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
    arguments = parser.parse_args(rest)
    simulate_devices(generate.mesh_of(arguments).size, distributed.join(*meeting))
    if jax.process_index() > 0:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    return generate.generate(arguments)


if __name__ == "__main__":
    run_command(main)
