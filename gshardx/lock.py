"""One process at a time writes into a directory."""

import fcntl
from pathlib import Path
from typing import IO

from gshardx.errors import BadInput


def hold(folder: Path, flag: str, does: str) -> IO[str]:
    """Create the directory and hold it for this process as long as the returned file is open.

    Args:
        folder: the directory.
        flag: by which the user named it, such as ``--out``; for messages.
        does: what another process does while it holds it, such as ``writes it``; for messages.

    Raises:
        BadInput: it can't be written, or another process holds it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        held = (folder / ".lock").open("w")
    except OSError as error:
        raise BadInput(f"{flag} {folder}: can't be written ({error.strerror}); choose another {flag}") from error
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        held.close()
        raise BadInput(f"{flag} {folder}: another process {does}; wait for it or use another") from error
    return held
