"""One process at a time writes into a run's directory."""

import fcntl
from pathlib import Path
from typing import IO

from gshardx.errors import BadInput


def hold(run: Path) -> IO[str]:
    """Create the directory and hold it for this process as long as the returned file is open.

    Raises:
        BadInput: it can't be written, or another process trains in it.
    """
    try:
        run.mkdir(parents=True, exist_ok=True)
        held = (run / ".lock").open("w")
    except OSError as error:
        raise BadInput(f"run_dir {run}: can't be written ({error.strerror}); choose another --run_dir") from error
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise BadInput(f"run_dir {run}: another process trains in it; wait for it or use another") from error
    return held
