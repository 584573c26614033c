"""``python -m gshardx.infer generate --run RUN_DIR --prompt TEXT``"""

import argparse
from typing import NoReturn

from gshardx.cli import run_command
from gshardx.errors import BadInput
from gshardx.infer import generate
from gshardx.sharding import simulate_devices


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise BadInput(f"{message} (see {self.prog} --help)")


def main(argv: list[str]) -> int:
    parser = _Parser(prog="python -m gshardx.infer", description="Use a trained run.", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    described = "Continue prompts; the mesh says over how many devices (default: one)."
    generate.add_arguments(
        commands.add_parser("generate", help="continue prompts", description=described, allow_abbrev=False)
    )
    arguments = parser.parse_args(argv)
    simulate_devices(generate.mesh_of(arguments).size)
    return generate.generate(arguments)


if __name__ == "__main__":
    run_command(main)
