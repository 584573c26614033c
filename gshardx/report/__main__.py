"""``python -m gshardx.report RUN_DIR [OTHER_RUN_DIR] [--out FILE]``

Imports no JAX, nor what imports it (gshardx.cli): the page is written before JAX would have started.
"""

import sys
from dataclasses import replace
from pathlib import Path

from gshardx.arguments import CommandParser
from gshardx.errors import BadInput
from gshardx.report.page import page
from gshardx.report.read import read_run

DESCRIPTION = """Write one HTML page about a training run, or about two side by side: it needs no network, and no other
file. Prints the page's path. Exit codes: 0 done, 2 bad input."""


def main(argv: list[str]) -> int:
    parser = CommandParser(prog="python -m gshardx.report", description=DESCRIPTION)
    parser.add_argument("run", type=Path, metavar="RUN_DIR")
    parser.add_argument("other", type=Path, nargs="?", metavar="OTHER_RUN_DIR", help="to compare with")
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="default: RUN_DIR/report.html, of two runs compare.html"
    )
    arguments = parser.parse_args(argv)
    runs = [read_run(path) for path in (arguments.run, arguments.other) if path is not None]
    if len(runs) == 2 and runs[0].name == runs[1].name:
        runs = [replace(run, name=str(path)) for run, path in zip(runs, (arguments.run, arguments.other), strict=True)]
    out = arguments.out or arguments.run / ("report.html" if len(runs) == 1 else "compare.html")
    try:
        out.write_bytes(page(runs).encode("utf-8", "replace"))
    except OSError as error:
        raise BadInput(f"{out}: can't be written ({error.strerror}); name another file with --out") from error
    print(out)
    return 0


if __name__ == "__main__":
    try:
        code = main(sys.argv[1:])
    except BadInput as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        code = 2
    sys.exit(code)
