"""When a run saves, and what becomes of a save that fails."""

import time
from collections.abc import Callable, Sequence

import jax

from gshardx.checkpoint.store import CheckpointStore, SaveFailed
from gshardx.config import CheckpointConfig
from gshardx.train.evaluate import BITS_PER_BYTE
from gshardx.train.goodput import Goodput
from gshardx.train.metrics import Scalars
from gshardx.train.resume import Rows, items_of
from gshardx.train.state import TrainState


class Wish(int):
    """What a process asks of all, as a number of which :class:`gshardx.sharding.distributed.Largest` takes the largest:
    twice the signal that is to end the run, plus one where a save is due by the clock."""

    @classmethod
    def of(cls, caught: Sequence[int], due: bool) -> "Wish":
        return cls(2 * (caught[0] if caught else 0) + due)

    @property
    def signal(self) -> int:
        return self // 2


class Saver:
    """Saves a run's states where ``config`` wants it.

    Args:
        config: cadence, and what a failure means.
        store: where to.
        goodput: told what was saved.
        say: where lines about failures go.
    """

    def __init__(
        self, config: CheckpointConfig, store: CheckpointStore, goodput: Goodput, say: Callable[[str], None]
    ) -> None:
        self._config, self._store, self._goodput, self._say = config, store, goodput, say
        self._last = time.monotonic()

    @property
    def due(self) -> bool:
        """Whether the clock asks for a save; process 0's does for all."""
        minutes = self._config.every_minutes
        return jax.process_index() == 0 and minutes is not None and time.monotonic() - self._last >= 60 * minutes

    def wants(self, step: int, scores: Scalars, wish: Wish, *, last: bool) -> bool:
        """Whether ``step`` is to be saved: it is due, wished for, one of the best, or the ``last``."""
        score = scores.get(BITS_PER_BYTE)
        return last or wish > 0 or self._store.is_due(step) or (score is not None and self._store.is_best(score))

    def save(self, step: int, state: TrainState, rows: Rows, scores: Scalars, *, last: bool) -> None:
        """Start a save.

        Raises:
            SaveFailed: this or the previous save, and the run is to stop at that, or to end with this step.
        """
        self.check()
        items, score = items_of(state, rows), scores.get(BITS_PER_BYTE)
        if self._survived(lambda: self._store.save(step, items, score=score), last=last):
            self._goodput.saved(step)
            self._last = time.monotonic()

    def check(self) -> None:
        """Notice a save that has failed in the background; cheap, called every step. Raises as :meth:`save` does."""
        self._survived(self._store.check, last=False)

    def _survived(self, action: Callable[[], bool | None], *, last: bool) -> bool:
        """Whether ``action`` has saved; its failure is said, or raised."""
        try:
            return bool(action())
        except SaveFailed as error:
            # With several processes a failure behind one's back leaves the others waiting in Orbax.
            if self._config.on_error == "stop" or last or jax.process_count() > 1:
                raise
            self._say(f"{error.what}; training goes on (checkpoint.on_error = continue)")
            return False
