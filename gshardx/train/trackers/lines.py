"""Files of one JSON object a step, which a run that goes on continues."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class Lines:
    """Appends objects with a ``step``. Lines of steps from ``first_step`` on (left by a run that went further than its
    checkpoint) are dropped."""

    def __init__(self, path: Path, first_step: int) -> None:
        drop_lines_from(path, first_step)
        self._lines = path.open("a", encoding="utf-8")

    def write(self, step: int, scalars: Mapping[str, Any]) -> None:
        """What is not finite becomes null."""
        line = {"step": step, **{name: _finite(value) for name, value in scalars.items()}}
        self._lines.write(json.dumps(line) + "\n")
        self._lines.flush()

    def close(self) -> None:
        self._lines.close()


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def drop_lines_from(path: Path, first_step: int) -> None:
    """Keep the whole lines of earlier steps; a line cut off by a kill goes too."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        record = _parsed(line)
        if record is not None and record["step"] < first_step:
            kept.append(line + "\n")
    scratch = path.with_suffix(".tmp")
    scratch.write_text("".join(kept), encoding="utf-8")
    scratch.replace(path)


def _parsed(line: str) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except json.JSONDecodeError:
        return None
    return record if isinstance(record, dict) and isinstance(record.get("step"), int) else None
