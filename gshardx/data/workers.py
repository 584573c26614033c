"""What every worker process does first."""

import multiprocessing
import os
import threading


def end_with_parent() -> None:
    """In a worker: end when the process that started it is gone, ``kill -9`` included.

    Else it would wait for ever on a queue that nobody reads, and keep the terminal's pipes open.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True, name="end with parent").start()
