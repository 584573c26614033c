"""The one shape that every framework trains. Imports no framework, so that each one's own interpreter can read it."""

import dataclasses
import statistics

WARM_UP_STEPS = 4
"""Steps at the start that no median counts: compilation, caches, thread pools."""


@dataclasses.dataclass(frozen=True)
class Shape:
    """A Mixtral-like decoder, MoE with SwiGLU experts in every layer, and the batch it trains on; fp32, AdamW."""

    layers: int = 4
    width: int = 256
    heads: int = 8
    kv_heads: int = 4
    head_dim: int = 32
    expert_hidden: int = 512
    experts: int = 8
    top_k: int = 2
    capacity_factor: float = 1.25
    vocab: int = 4096
    sequence: int = 256
    batch: int = 16

    @property
    def tokens_per_step(self) -> int:
        return self.batch * self.sequence


SHAPE = Shape()


def steady_median(step_seconds: list[float]) -> float:
    """The median step after warm-up."""
    return statistics.median(step_seconds[WARM_UP_STEPS:])
