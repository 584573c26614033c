"""What is computed: Flax NNX modules over pure functions."""

from gshardx.layers.attention import Attention
from gshardx.layers.blending import Blend, Blending
from gshardx.layers.block import Block, Layers, Stack, Unit
from gshardx.layers.dense import Dense
from gshardx.layers.dispatch import Auto, Dispatcher, Einsum, Gather, Ragged, choose_dispatcher
from gshardx.layers.embed import Embedding, Unembedding
from gshardx.layers.experts import Experts, FeedForward
from gshardx.layers.kernel_pages import KernelPages, has_kernel, kernel_attention
from gshardx.layers.kinds import Kinds, kinds_of
from gshardx.layers.latent import LatentAttention
from gshardx.layers.memory import KVCache, Memory, Packed
from gshardx.layers.merged_experts import MergedExperts, merged
from gshardx.layers.mixing import Mixing
from gshardx.layers.moe import MoE, MoEMetrics
from gshardx.layers.norm import NORMS, LayerNorm, RMSNorm
from gshardx.layers.paged import Paged, paged_attention
from gshardx.layers.param import param_shardings
from gshardx.layers.pools import FullPages, Int8Pages, LatentPages, Pool, abstract_pool
from gshardx.layers.reach import Reach
from gshardx.layers.rope import Rope
from gshardx.layers.routing import (
    AdaMoERouter,
    BaseRouter,
    Capacity,
    CosineRouter,
    DemixRouter,
    DselectKRouter,
    DsMoeRouter,
    DynMoERouter,
    ExpertChoiceRouter,
    GShardRouter,
    HashRouter,
    LoryRouter,
    Losses,
    MeoRouter,
    MoePlusPlusRouter,
    NoisyTopKRouter,
    QuantileRouter,
    ReluRouter,
    Router,
    RouterState,
    RouterStats,
    Routing,
    SentenceRouter,
    SigmoidBiasRouter,
    SinkhornRouter,
    SkyworkRouter,
    SmearRouter,
    SmoeDropoutRouter,
    SoftMoERouter,
    SparseMixerRouter,
    StableRouter,
    SwitchRouter,
    TaskRouter,
    TopKRouter,
)
from gshardx.layers.shared import GatedShared, Residual, Shared

__all__ = [
    "DselectKRouter",
    "DsMoeRouter",
    "SmoeDropoutRouter",
    "Attention",
    "Auto",
    "BaseRouter",
    "Blend",
    "Blending",
    "Block",
    "AdaMoERouter",
    "Capacity",
    "CosineRouter",
    "DemixRouter",
    "DynMoERouter",
    "SentenceRouter",
    "TaskRouter",
    "Dense",
    "Dispatcher",
    "Einsum",
    "Embedding",
    "ExpertChoiceRouter",
    "Experts",
    "FeedForward",
    "FullPages",
    "GShardRouter",
    "GatedShared",
    "Gather",
    "HashRouter",
    "Int8Pages",
    "KVCache",
    "KernelPages",
    "Kinds",
    "LatentAttention",
    "LatentPages",
    "LayerNorm",
    "Layers",
    "LoryRouter",
    "Losses",
    "MeoRouter",
    "Memory",
    "MergedExperts",
    "MoE",
    "MoEMetrics",
    "Mixing",
    "MoePlusPlusRouter",
    "NORMS",
    "NoisyTopKRouter",
    "Packed",
    "Paged",
    "Pool",
    "QuantileRouter",
    "RMSNorm",
    "Ragged",
    "Reach",
    "ReluRouter",
    "Residual",
    "Rope",
    "Router",
    "RouterState",
    "RouterStats",
    "Routing",
    "Shared",
    "SigmoidBiasRouter",
    "SinkhornRouter",
    "SkyworkRouter",
    "SoftMoERouter",
    "SmearRouter",
    "SparseMixerRouter",
    "StableRouter",
    "Stack",
    "SwitchRouter",
    "TopKRouter",
    "Unembedding",
    "Unit",
    "abstract_pool",
    "choose_dispatcher",
    "has_kernel",
    "kernel_attention",
    "kinds_of",
    "merged",
    "paged_attention",
    "param_shardings",
]
