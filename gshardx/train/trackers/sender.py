"""What :class:`gshardx.train.trackers.hosted.Hosted` starts: ``sender.py MODULE`` hands lines of JSON to a tracker.

The first line is what its ``init`` takes, each one after it a step and its scalars, the last one null. Imports nothing
of gshardx, so that it is light.
"""

import importlib
import json
import os
import signal
import sys
from typing import TextIO


def send(module: str, lines: TextIO) -> None:
    tracker = importlib.import_module(module)
    run = tracker.init(**json.loads(lines.readline()))
    for line in lines:
        if (item := json.loads(line)) is None:
            break
        step, scalars = item
        run.log(scalars, step=step)
    tracker.finish()


def main() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a cluster sends it to all; the trainer says when to end
    lines = os.fdopen(os.dup(0))
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)  # a question finds no answer there, and takes no step for one
    try:
        send(sys.argv[1], lines)
    except BaseException as error:  # whatever it is, its last line tells
        reason = " ".join(str(error).split())
        print(f"{type(error).__name__}: {reason}", file=sys.stderr, flush=True)
        os._exit(1)  # what they do at the end of a program may wait for ever


if __name__ == "__main__":
    main()
