"""The layers that benchmarks/gpu.py times, and how tokens choose. Imports no framework, for each one's interpreter."""

import dataclasses

import numpy as np

LOADS = ("even", "skewed")
CONCENTRATION = 8.0
"""Of the Dirichlet distribution of skewed loads: the busiest of 8, 128, 256 experts gets 1.6, 3, 4 even shares."""


@dataclasses.dataclass(frozen=True)
class LayerShape:
    """Gated experts of a public model; ``goal`` in percent of the measured matmul ceiling."""

    name: str
    width: int
    hidden: int
    experts: int
    top_k: int
    goal: float
    backward: bool = True

    def forward_flops(self, tokens: int, kept: float = 1.0) -> float:
        """Of the experts alone; a dropped choice counts nothing."""
        return 6.0 * self.width * self.hidden * self.top_k * tokens * kept


SHAPES = (
    LayerShape("Mixtral 8x7B", 4096, 14336, 8, 2, goal=70),
    LayerShape("Qwen3-30B-A3B", 2048, 768, 128, 8, goal=50),
    # The weights alone are 22.5 GB in bf16, and so are their gradients: forward only. The proxy is Megatron-Core's.
    LayerShape("DeepSeek-V3", 7168, 2048, 256, 8, goal=50, backward=False),
    LayerShape("DeepSeek-V3 proxy", 7168, 2048, 32, 8, goal=50),
)
SMALL_SHAPES = (
    LayerShape("coarse", 64, 128, 8, 2, goal=70),
    LayerShape("fine", 64, 32, 16, 4, goal=50, backward=False),
)
TOKENS, SMALL_TOKENS = (4096, 16384), (64,)
SEQUENCE = 4096
"""Tokens of a group, at most."""


def shares(load: str, experts: int) -> np.ndarray:
    """Each expert's chance."""
    if load == "even":
        return np.full(experts, 1.0 / experts)
    return np.random.default_rng(0).dirichlet(np.full(experts, CONCENTRATION))


def logit_bias(load: str, experts: int) -> np.ndarray:
    """Added to router logits of unit variance."""
    return np.log(shares(load, experts)).astype(np.float32)


def group_sizes(load: str, experts: int, rows: int) -> np.ndarray:
    """Rows of each expert; they add up to ``rows``."""
    if load == "even":
        return np.diff(np.linspace(0, rows, experts + 1).astype(np.int32))
    return np.random.default_rng(1).multinomial(rows, shares(load, experts)).astype(np.int32)
