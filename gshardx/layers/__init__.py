"""What is computed: Flax NNX modules over pure functions."""

from gshardx.layers.attention import Attention
from gshardx.layers.block import Block, Stack, Unit
from gshardx.layers.dispatch import Dispatcher, Einsum, Gather
from gshardx.layers.embed import Embedding, Unembedding
from gshardx.layers.experts import Experts, FeedForward
from gshardx.layers.memory import KVCache, Memory, Packed
from gshardx.layers.moe import MoE, MoEMetrics, expert_capacity
from gshardx.layers.norm import RMSNorm
from gshardx.layers.routing import GShardRouter, Router, RouterStats, Routing

__all__ = [
    "Attention", "Block", "Dispatcher", "Einsum", "Embedding", "Experts", "FeedForward", "GShardRouter", "Gather",
    "KVCache", "Memory", "MoE", "MoEMetrics", "Packed", "RMSNorm", "Router", "RouterStats", "Routing", "Stack",
    "Unembedding", "Unit", "expert_capacity",
]  # fmt: skip
