"""How large an engine is."""

import dataclasses
import math

import numpy as np
from jax.sharding import Mesh

from gshardx.errors import BadInput
from gshardx.infer.exchange import EXCHANGES
from gshardx.infer.program import Sizes
from gshardx.infer.quantize import WEIGHTS

KV_DTYPES = ("float32", "bfloat16", "int8")
DRAFTS = ("prompt_lookup", "fewer_experts")
ATTENTION = ("xla", "pallas")
SCORES = 64
"""Tokens of prompts whose log-probabilities a call may ask for."""


def batch_shards(mesh: Mesh) -> int:
    """Devices that have sequences of their own."""
    return math.prod(mesh.shape[axis] for axis in ("data", "fsdp", "expert"))


@dataclasses.dataclass(frozen=True)
class EngineConfig:
    """Sizes, each for one batch shard of the mesh.

    Raises:
        BadInput: one that can't be.
    """

    slots: int = 32
    """Sequences computed at once."""
    max_length: int = 1024
    """Tokens of a prompt and its continuation together."""
    page_size: int = 64
    """Tokens of a page; prefixes are shared in whole pages. TPUs store 64 in the room of 128: use 128 there."""
    pages: int | None = None
    """Of the cache; default: enough for ``slots`` sequences of ``max_length``."""
    budget: int = 128
    """Tokens of one call that computes prompts: more is faster for them, and holds up those that write."""
    tile: int = 32
    """Rows of a matrix product at most; halved where that is what it takes for all programs to give the same bits."""
    steps: int = 8
    """Tokens that a sequence may write in one call, where all are writing."""
    ahead_ms: float | None = None
    """Milliseconds of work that the device is given in advance at most, as far as single steps allow: who comes
    meanwhile waits for it. Default: a call beyond the one that runs, each of ``steps`` tokens, which gives most tokens
    a second. For one process: clocks of several differ, and so would their plans."""
    programs: int = 9
    """To compile at most, those of a drafter left out: more fit calls better, and take longer to start."""
    kv_dtype: str | None = None
    """Of keys and values; one of KV_DTYPES; default: the model's. int8 has a scale for each head of a token."""
    attention: str = "xla"
    """Who reads the pages, one of ATTENTION: a loop over them that runs anywhere, or JAX's own kernels for TPUs and
    GPUs, for bfloat16 (:mod:`gshardx.layers.kernel_pages`)."""
    weights: str | None = None
    """Of attention, feed-forward networks and experts, one of WEIGHTS (:mod:`gshardx.infer.quantize`); default: as
    trained."""
    exchange: str | None = None
    """How tokens reach experts on several devices, one of EXCHANGES; default: by what sends and reads fewest bytes."""
    drafts: str | None = None
    """Who guesses tokens ahead, one of DRAFTS; default: nobody."""
    draft_depth: int = 7
    """Guesses for a sequence at most; fewer, or none, where that is faster. 8 tokens fill the smallest call."""
    draft_experts: int = 1
    """Experts a token of the drafter ``fewer_experts``."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, int) and value < 1:
                raise BadInput(f"{field.name} = {value}: must be 1 or more")
        if self.ahead_ms is not None and not self.ahead_ms > 0:
            raise BadInput(f"ahead_ms = {self.ahead_ms:g}: must be over 0")
        for name, values in (
            ("kv_dtype", KV_DTYPES),
            ("attention", ATTENTION),
            ("drafts", DRAFTS),
            ("weights", WEIGHTS),
            ("exchange", EXCHANGES),
        ):
            if getattr(self, name) not in (None, *values):
                raise BadInput(f"{name} = {getattr(self, name)}: must be one of {', '.join(values)}")
        if self.tile < 2:
            raise BadInput(f"tile = {self.tile}: a product of one row is made by another kernel; use 2 or more")

    def sizes(self, mesh: Mesh) -> Sizes:
        pages = self.pages or self.slots * -(-self.max_length // self.page_size)
        return Sizes(
            batch_shards(mesh),
            self.slots,
            pages + 1,
            self.page_size,
            self.max_length,
            self.tile,
            self.steps,
            self.kv_dtype,
            self.attention,
        )

    def samples(self) -> int:
        """Places where a call of prompts or guesses may draw, or score; of more than a tile, whole tiles."""
        most = self.slots * (1 + self.draft_depth * bool(self.drafts)) + SCORES
        return max(2, most if most <= self.tile else -(-most // self.tile) * self.tile)

    def token_buckets(self) -> list[int]:
        """A small call for a few tokens, and the largest, which goes over as many tiles as it needs."""
        whole = -(-max(self.budget, self.slots) // self.tile) * self.tile
        return sorted({min(8, self.tile), whole})

    def row_buckets(self) -> list[int]:
        """Powers of two, as many as ``programs`` leaves; never one row, whose products another kernel makes."""
        top = max(2, self.slots)
        powers = math.ceil(math.log2(top))
        count = min(powers, max(1, self.programs - 1 - len(self.token_buckets())))
        spaced = np.linspace(1, powers, count) if count > 1 else [powers]
        return sorted({min(2 ** round(power), top) for power in spaced})
