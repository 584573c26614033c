"""``gshardx.infer serve`` on the tests' tiny model, as a process of its own.

Only the run is not read from a disk; see tests/test_readme.py for one that is.
"""

import sys

from gshardx.cli import run_command
from gshardx.infer import __main__
from gshardx.infer.server import serve
from tests.infer.conftest import Model


def main(argv):
    run = Model().run()  # before the command starts: what drawing its weights compiles does not count
    serve.load_run = lambda path, mesh: run
    return __main__.main(["serve", "--run", "tiny", "--max_length", "4096", *argv])


if __name__ == "__main__":
    sys.argv[0] = "serve"
    run_command(main)
