"""RUN_DIR/events.jsonl: what happened in a run beside its steps, a JSON object a line."""

import contextlib
import json
import time
from pathlib import Path
from typing import Any


class Events:
    """Appends ``{"time": unix seconds, "step": ..., "event": ..., "text": ...}``, from any thread.

    Args:
        path: of the file; None: tell nobody (processes but the first).
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self.step = 0
        """The run's present step."""

    def tell(self, event: str, text: str, **more: Any) -> None:
        """A disk that refuses it never ends a run."""
        if self._path is None:
            return
        line = {"time": time.time(), "step": self.step, "event": event, "text": text, **more}
        with contextlib.suppress(OSError), self._path.open("a", encoding="utf-8") as out:
            out.write(json.dumps(line) + "\n")
