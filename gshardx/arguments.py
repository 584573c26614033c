"""The parser of every command whose flags are no keys of a config. Imports no JAX: reports start without it."""

import argparse
from typing import Any, NoReturn

from gshardx.errors import BadInput


class CommandParser(argparse.ArgumentParser):
    """Whole names of flags only, and BadInput for what argparse refuses."""

    def __init__(self, **given: Any) -> None:
        super().__init__(**given, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        raise BadInput(f"{message} (see {self.prog} --help)")
