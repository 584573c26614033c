"""The model of a run, and whether it divides over a mesh."""

import dataclasses
import difflib
import math
from typing import Any, Literal

from gshardx.config.checks import at_least_zero, divisor, positive, share
from gshardx.errors import BadInput
from gshardx.sharding import MeshConfig

LOSSES = (
    "balance",
    "z",
    "first_choice",
    "all_choices",
    "batch",
    "device",
    "communication",
    "importance",
    "load",
    "mutual_information",
    "sparsity",
    "selector_entropy",
    "selector_reach",
    "diversity",
    "distillation",
)
RouterName = Literal[
    "gshard",
    "switch",
    "top_k",
    "sigmoid_bias",
    "sparse_mixer",
    "noisy_top_k",
    "skywork",
    "expert_choice",
    "hash",
    "base",
    "sinkhorn",
    "quantile",
    "cosine",
    "adamoe",
    "relu",
    "smoe_dropout",
    "ds_moe",
    "dselect_k",
    "dynmoe",
    "sentence",
    "task",
    "demix",
    "soft_moe",
    "stable",
    "moe_pp",
    "smear",
    "lory",
    "meo",
]
SCALES = ("embedding", "residual", "attention", "logits")


@dataclasses.dataclass(frozen=True)
class MoEConfig:
    """The Mixture-of-Experts layers."""

    num_experts: int = 8
    """Experts in each MoE layer."""
    top_k: int = 2
    """Experts that each token chooses."""
    every: int = 2
    """Every how many blocks one is an MoE block: 1 all of them, 2 every other, as in GShard."""
    dense_first: int = 0
    """Dense blocks before that pattern starts (DeepSeek-V3 has 3)."""
    router: RouterName = "gshard"
    """How tokens choose (docs/routers)."""
    router_options: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Options of that router, for example {second_expert: random} (docs/routers)."""
    capacity_factor: float | None = 1.25
    """Room of an expert in training, as a multiple of an even share of the choices; null: room for all (dropless)."""
    hidden: int = 256
    """Hidden units of an expert."""
    group_size: int | None = None
    """Tokens that compete for slots; default: one sequence."""
    biases: bool = False
    """Add biases to the experts' matrix products."""
    shared_hidden: int = 0
    """Hidden units of a dense network beside the routed experts; 0: none."""
    shared: Literal["plain", "gated", "residual"] = "plain"
    """plain: added (DeepSeek); gated: times a sigmoid (Qwen); residual: both weighed by a softmax (PR-MoE)."""
    dispatcher: Literal["auto", "gather", "einsum", "ragged"] = "auto"
    """gather: by index; einsum: GShard's one-hot form; ragged: sorted rows, for dropless; auto says what it chose."""
    wire: Literal["same", "bfloat16"] = "same"
    """Type in which tokens travel between devices."""
    losses: dict[str, float] = dataclasses.field(default_factory=lambda: {"balance": 0.01})
    """Weights of auxiliary losses: balance (the router's own; 1.0 a layer at balance), first_choice, all_choices,
    batch, device, communication, importance, mutual_information, z, and those of one router (docs/routers)."""
    adaptive_balance: bool = False
    """Let each layer's weight of "balance" follow its drop rate (Skywork-MoE), from the one in losses towards at
    most 0.01."""

    def __post_init__(self) -> None:
        positive("model.moe", self, "num_experts", "top_k", "every", "capacity_factor", "hidden", "group_size")
        at_least_zero("model.moe", self, "shared_hidden", "dense_first")
        if self.adaptive_balance and self.capacity_factor is None:
            raise BadInput(
                "model.moe.adaptive_balance follows the drop rate, and model.moe.capacity_factor = null drops nothing; "
                "use one of them"
            )
        for name, weight in self.losses.items():
            if name not in LOSSES:
                nearest = difflib.get_close_matches(name, LOSSES, n=1, cutoff=0.0)[0]
                raise BadInput(f"model.moe.losses.{name}: no such loss; did you mean {nearest}?")
            if not 0 <= weight < math.inf:
                raise BadInput(f"model.moe.losses.{name} = {weight}: must be 0 or more, and finite")
        if self.top_k > self.num_experts:
            raise BadInput(
                f"model.moe.top_k = {self.top_k} is more than model.moe.num_experts = {self.num_experts}; "
                f"use a top_k of {self.num_experts} or less"
            )


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The decoder-only transformer."""

    layers: int = 4
    """Blocks; beside moe.dense_first a multiple of moe.every."""
    width: int = 128
    """Width of the residual stream."""
    heads: int = 4
    """Query heads."""
    kv_heads: int = 2
    """Key and value heads; divides heads."""
    head_dim: int = 32
    """Width of a head; even."""
    hidden: int = 512
    """Hidden units of the dense blocks."""
    activation: Literal["swiglu", "geglu", "clamped_swiglu", "relu", "gelu"] = "swiglu"
    """Non-linearity of dense blocks and experts."""
    rope_base: float = 10_000.0
    """Base of the rotary positions."""
    rope: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Options of rotary positions, for example {scaling: linear, factor: 4} (docs/attention.md)."""
    attention: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Options of attention, for example {biases: qkv, qk_norm: head} (docs/attention.md)."""
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Options of the decoder: {norm: layer} for layer norms, {logits_bias: true} (docs/attention.md)."""
    norm_epsilon: float = 1e-6
    """Added to the mean square, or variance, by every norm."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type to compute in; parameters, norms, softmaxes, routers and losses are float32."""
    float32: list[Literal["residual", "attention", "feed_forward", "experts", "logits"]] = dataclasses.field(
        default_factory=list
    )
    """Parts that compute in float32 whatever dtype is; residual: the stream that blocks add to."""
    remat: Literal["none", "dots", "keep_all_to_all", "offload", "full"] = "none"
    """What the backward pass makes again, from most memory to least: nothing; all but results of matrix products and
    what came by all-to-all; all but the latter; the same, kept in the host's memory; everything."""
    dropout: float = 0.0
    """Share of the embedding and of each branch's output that training sets to 0."""
    tie_embeddings: bool = False
    """Use the embedding's table, transposed, for the logits."""
    scales: dict[str, float] = dataclasses.field(default_factory=dict)
    """Factors (Granite): embedding; residual, on each branch's output; attention, on scores instead of
    1 / sqrt(head_dim); logits, by default 1 / sqrt(width) with tie_embeddings (T5)."""
    vocab_size: int | None = None
    """Rows of the embedding, where there are more than the tokenizer has tokens; null: as many."""
    logit_cap: float | None = None
    """Bound of the logits, as cap * tanh(logits / cap) (Gemma 2 has 30); null: none."""
    moe: MoEConfig = dataclasses.field(default_factory=MoEConfig)

    def __post_init__(self) -> None:
        positive("model", self, "layers", "width", "heads", "kv_heads", "head_dim", "hidden", "rope_base", "logit_cap")
        positive("model", self, "norm_epsilon", "vocab_size")
        for name, scale in self.scales.items():
            if name not in SCALES:
                nearest = difflib.get_close_matches(name, SCALES, n=1, cutoff=0.0)[0]
                raise BadInput(f"model.scales.{name}: no such factor; did you mean {nearest}?")
            if not 0 < scale < math.inf:
                raise BadInput(f"model.scales.{name} = {scale}: must be above 0 and finite")
        share("model", self, "dropout")
        every, first = self.moe.every, self.moe.dense_first
        if self.layers <= first or (self.layers - first) % every:
            up = first + max(1, math.ceil((self.layers - first) / every)) * every
            beside = f" beside model.moe.dense_first = {first}" if first else ""
            raise BadInput(
                f"model.layers = {self.layers} is not a multiple of model.moe.every = {every}{beside}; use {up} layers"
            )
        if self.grouped_heads and self.heads % self.kv_heads:
            raise BadInput(
                f"model.heads = {self.heads} is not a multiple of model.kv_heads = {self.kv_heads}; "
                f"use model.heads = {math.ceil(self.heads / self.kv_heads) * self.kv_heads}"
            )
        if self.grouped_heads and self.head_dim % 2:
            raise BadInput(f"model.head_dim = {self.head_dim}: rotary positions turn pairs; use {self.head_dim + 1}")

    @property
    def attention_kind(self) -> str:
        """grouped: query heads share key and value heads; latent: all are made from one vector (docs/attention.md)."""
        return str(self.attention.get("kind", "grouped"))

    @property
    def grouped_heads(self) -> bool:
        """Whether ``kv_heads`` and ``head_dim`` mean anything."""
        return self.attention_kind == "grouped"

    @property
    def moe_layers(self) -> int:
        """Blocks with experts."""
        return (self.layers - self.moe.dense_first) // self.moe.every


def check_model_on_mesh(model: ModelConfig, mesh: MeshConfig, batch_size: int = 0) -> None:
    """Raise BadInput unless every dimension that the mesh splits divides over its axis.

    The axis that the message proposes suits every dimension on it, and ``batch_size``.
    """
    split = [
        ("model.moe.num_experts", model.moe.num_experts, "expert"),
        ("model.width", model.width, "fsdp"),
        ("model.heads", model.heads, "tensor"),
        *_attention_on_mesh(model),
        ("model.hidden", model.hidden, "tensor"),
        ("model.moe.hidden", model.moe.hidden, "tensor"),
        ("model.moe.shared_hidden", model.moe.shared_hidden, "tensor"),
    ]
    for name, value, axis in split:
        parts = mesh.shape[axis]
        if value % parts:
            common = math.gcd(*(other for _, other, along in split if along == axis))
            others = mesh.batch_shards // parts
            if axis != "tensor" and batch_size % others == 0:
                common = math.gcd(common, batch_size // others)
            raise BadInput(
                f"{name} = {value} does not divide over mesh.{axis} = {parts}; use mesh.{axis} = "
                f"{divisor(common, parts)}"
            )


def _attention_on_mesh(model: ModelConfig) -> list[tuple[str, int, str]]:
    if model.grouped_heads:
        return [("model.kv_heads", model.kv_heads, "tensor")]
    ranks = ((f"model.attention.{name}", model.attention.get(name), "fsdp") for name in ("q_rank", "kv_rank"))
    return [(name, rank, axis) for name, rank, axis in ranks if isinstance(rank, int)]
