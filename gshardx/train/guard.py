"""What watches a run: steps whose gradients are not finite, losses that spike, router logits that explode."""

import math
import statistics
from collections import deque
from collections.abc import Callable

import numpy as np

from gshardx.config import GuardConfig
from gshardx.errors import BadInput
from gshardx.train.step import StepMetrics


class Guard:
    """Looks at each step's metrics once they are on the host; every process sees the same.

    Args:
        config: what is too much.
        skipped: steps that the run has skipped before.
        say: where lines go.

    Attributes:
        spike: the step whose loss spiked; 0: none has.
        skipped: steps that changed nothing, in the whole run.
    """

    def __init__(self, config: GuardConfig, skipped: int, say: Callable[[str], None]) -> None:
        self._config, self._say = config, say
        self._losses: deque[float] = deque(maxlen=config.spike_window)
        self._in_a_row, self._loud = 0, set[int]()
        self.skipped, self.spike = skipped, 0

    def see(self, step: int, metrics: StepMetrics) -> None:
        """Look at a step.

        Raises:
            BadInput: more steps in a row than ``max_skipped`` had gradients that are not finite.
        """
        self._watch_routers(step, np.asarray(metrics.stats.largest_logit))
        if int(metrics.skipped) > self.skipped:
            self._count_skipped(step, int(metrics.skipped))
            return
        self._in_a_row = 0
        if self.spike == 0 and self._is_spike(step, float(metrics.loss)):
            self.spike = step
        self._losses.append(float(metrics.loss))

    def _count_skipped(self, step: int, skipped: int) -> None:
        self.skipped, self._in_a_row = skipped, self._in_a_row + 1
        self._say(f"step {step}: gradients are not finite, so it changed nothing; {skipped} such step(s) so far")
        if self._in_a_row > self._config.max_skipped:
            raise BadInput(
                f"step {step}: gradients have not been finite for {self._in_a_row} steps in a row (guard.max_skipped = "
                f"{self._config.max_skipped}); lower optimizer.learning_rate, or find the cause with --debug.nans true"
            )

    def _is_spike(self, step: int, loss: float) -> bool:
        factor = self._config.spike_factor
        if factor is None or len(self._losses) < self._config.spike_window:
            return False
        usual = statistics.median(self._losses)
        if not loss > factor * usual:
            return False
        self._say(
            f"step {step}: loss {loss:.4g} is {loss / max(usual, 1e-30):.1f} times the median of the last "
            f"{len(self._losses)} steps (guard.spike_factor = {factor:g})"
        )
        return True

    def _watch_routers(self, step: int, largest: np.ndarray) -> None:
        """One line when a layer's logits grow beyond the limit, and again only after they had halved."""
        limit = self._config.router_logit
        for layer, logit in enumerate(largest.tolist()):
            if layer in self._loud and logit < limit / 2:
                self._loud.discard(layer)
            if layer not in self._loud and not logit <= limit:
                self._loud.add(layer)
                what = f"{logit:.4g}" if math.isfinite(logit) else "not finite"
                self._say(
                    f"step {step}: the largest router logit of MoE layer {layer} is {what}, above guard.router_logit = "
                    f"{limit:g}; raise model.moe.losses.z, or lower optimizer.learning_rate"
                )
