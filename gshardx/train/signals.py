"""SIGTERM and Ctrl-C as a wish to save and end."""

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def caught_signals() -> Iterator[list[int]]:
    """SIGTERM and SIGINT (Ctrl-C) append their number to the list; a second one acts as it always did."""
    caught: list[int] = []
    before: dict[signal.Signals, Callable[..., object] | int | None] = {}

    def handle(number: int, frame: FrameType | None) -> None:
        caught.append(number)
        print(f"{signal.Signals(number).name}: saving after this step", file=sys.stderr, flush=True)
        signal.signal(number, before[signal.Signals(number)] or signal.SIG_DFL)

    for number in (signal.SIGTERM, signal.SIGINT):
        before[number] = signal.signal(number, handle)
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)
