"""Weights & Biases and trackio, each in a process of its own.

They wait for networks, ask for passwords, print, and hold a program back at its end until all is sent. None of this may
happen to a run.
"""

import contextlib
import dataclasses
import importlib.util
import json
import os
import queue
import secrets
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gshardx.config import Config
from gshardx.errors import BadInput

WAITING = 5000
"""Steps that may wait for the tracker; one that is further behind is left."""
GOODBYE = 20.0
"""Seconds that the end of a run waits for it."""


class Hosted:
    """One of them; its words go to RUN_DIR/MODULE.log.

    Args:
        module: ``wandb`` or ``trackio``.
        config: of the run; shown beside the curves.
        folder: RUN_DIR, which gives the run its name.
        first_step: from 2 on, a run that goes on, there too.

    Raises:
        OSError: its process can't be started.
    """

    def __init__(self, module: str, config: Config, folder: Path, first_step: int) -> None:
        about = {
            "project": config.tracking.project,
            "name": config.tracking.name or folder.resolve().name,
            "config": dataclasses.asdict(config),
            **_identity(module, folder, first_step),
        }
        self._log = folder / f"{module}.log"
        with self._log.open("a") as log:
            sender = str(Path(__file__).with_name("sender.py"))
            self._process = subprocess.Popen(
                [sys.executable, "-P", sender, module],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                start_new_session=True,  # no terminal to ask on, no Ctrl-C
                text=True,
            )
        self._waiting: queue.Queue[Any] = queue.Queue(WAITING)
        self._waiting.put(about)
        threading.Thread(target=self._hand_over, name=module, daemon=True).start()

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Hand over; raises OSError once its process has failed."""
        if self._process.poll() is not None:
            raise self._failed()
        try:
            self._waiting.put_nowait((step, dict(scalars)))
        except queue.Full:
            self._kill()
            raise OSError(f"it is {WAITING} steps behind") from None

    def close(self) -> None:
        """Wait until all is sent; raises OSError if it is not."""
        try:
            self._waiting.put(None, timeout=GOODBYE)
            code = self._process.wait(GOODBYE)
        except (queue.Full, subprocess.TimeoutExpired):
            self._kill()
            raise OSError(f"it did not end within {GOODBYE:g} s; see {self._log}") from None
        if code:
            raise self._failed()

    def _hand_over(self) -> None:
        """In a thread, as a pipe that nobody reads blocks. Its end is the tracker's."""
        with contextlib.suppress(BrokenPipeError), self._process.stdin as pipe:  # type: ignore[union-attr]
            for item in iter(self._waiting.get, None):
                pipe.write(json.dumps(item) + "\n")
                pipe.flush()
            pipe.write("null\n")  # not only its end, which a forked process may hold open

    def _failed(self) -> OSError:
        code, said = self._process.returncode, self._log.read_text(errors="replace").splitlines()
        reason = said[-1].rstrip(".") if code == 1 and said else f"it ended with exit code {code}"
        return OSError(f"{reason}; see {self._log}")

    def _kill(self) -> None:
        with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait(1)


def check_installed(module: str) -> None:
    """Raise BadInput unless there is such a package."""
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:  # without an origin: a folder of that name, such as wandb's own
        raise BadInput(f"tracking.trackers: {module} is not there; pip install 'gshardx[{module}]', or leave it out")


def _identity(module: str, folder: Path, first_step: int) -> dict[str, Any]:
    """trackio finds a run that goes on by its name, wandb by an id that no run had before, not even a deleted one."""
    if module == "trackio":
        return {"resume": "allow" if first_step > 1 else "never"}
    path = folder / "wandb.id"
    if first_step == 1 or not path.exists():
        path.write_text(secrets.token_hex(4))
    return {"id": path.read_text(), "resume": "allow", "dir": str(folder), "allow_val_change": True}
