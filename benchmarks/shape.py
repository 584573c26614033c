"""What every framework trains. Imports no framework, so that each one's own interpreter can read it."""

import dataclasses
import math
import statistics

WARM_UP_STEPS = 4
"""Steps at the start that no median counts: compilation, caches, thread pools."""


@dataclasses.dataclass(frozen=True)
class Shape:
    """A decoder with SwiGLU experts in every layer, and the batch it trains on; fp32, AdamW."""

    name: str
    experts: int
    top_k: int
    expert_hidden: int
    shared_hidden: int = 0
    """Of an expert that every token goes to; 0: none."""
    layers: int = 4
    width: int = 256
    heads: int = 8
    kv_heads: int = 4
    head_dim: int = 32
    capacity_factor: float = 1.25
    vocab: int = 4096
    sequence: int = 256
    batch: int = 16

    @property
    def tokens_per_step(self) -> int:
        return self.batch * self.sequence

    def expert_devices(self, devices: int) -> int:
        """Devices that the experts are split over; the others repeat them, each with rows of its own."""
        return math.gcd(self.experts, devices)


COARSE = Shape("coarse", experts=4, top_k=2, expert_hidden=1024)
MIXTRAL = Shape("mixtral", experts=8, top_k=2, expert_hidden=512)
FINE = Shape("fine", experts=64, top_k=8, expert_hidden=128, shared_hidden=128)
SHAPES = {shape.name: shape for shape in (COARSE, MIXTRAL, FINE)}
"""Few wide experts (GShard, Grok), Mixtral's, and many narrow ones with a shared one (DeepSeek, Qwen)."""


def steady_median(step_seconds: list[float]) -> float:
    """The median step after warm-up."""
    return statistics.median(step_seconds[WARM_UP_STEPS:])
