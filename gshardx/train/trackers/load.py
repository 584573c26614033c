"""RUN_DIR/expert_load.jsonl: each expert's share of its layer's choices, some times a run, for a picture over time."""

import numpy as np

from gshardx.layers import RouterStats
from gshardx.train.trackers.lines import Lines

LINES = 200
"""Lines of a run, about: 36 layers of 2,048 experts are then 100 MB."""


class ExpertLoad:
    """Adds up the steps' loads and writes their shares, 1.0 = balance, as lines of
    ``{"step": ..., "load": [layer][expert]}``.

    Args:
        lines: the file.
        steps: of the run.
    """

    def __init__(self, lines: Lines, steps: int) -> None:
        self._lines, self._every = lines, max(1, steps // LINES)
        self._sum: np.ndarray | None = None

    def add(self, step: int, stats: RouterStats) -> None:
        """``stats``: fetched."""
        load = np.asarray(stats.load, np.float64)
        self._sum = load if self._sum is None else self._sum + load
        if step % self._every:
            return
        share = self._sum / np.maximum(self._sum.mean(-1, keepdims=True), 1e-9)
        self._sum = None
        self._lines.write(step, {"load": np.round(share, 3).tolist()})

    def close(self) -> None:
        self._lines.close()
