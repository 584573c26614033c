"""One tree of frozen dataclasses that describes a run, and the rules that its values keep.

Every command reads it from a YAML file and ``--section.field`` overrides (gshardx/cli.py); RUN_DIR/config.yaml holds
what ran. Values that contradict each other raise BadInput, naming both and a value that would work.
"""

import dataclasses
import difflib
import math
from typing import Any, Literal

from gshardx.errors import BadInput
from gshardx.sharding import MeshConfig


def _positive(section: str, config: object, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if value is not None and not 0 < value < math.inf:
            raise BadInput(f"{section}.{name} = {value}: must be above 0 and finite")


def _at_least_zero(section: str, config: object, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if not 0 <= value < math.inf:
            raise BadInput(f"{section}.{name} = {value}: must be 0 or more, and finite")


def _divisor(of: int, at_most: int) -> int:
    """The largest divisor of ``of`` that is ``at_most`` or less."""
    return next(n for n in range(min(of, max(at_most, 1)), 0, -1) if of % n == 0)


LOSSES = ("balance", "z", "first_choice", "all_choices", "batch", "device", "communication", "importance")


@dataclasses.dataclass(frozen=True)
class MoEConfig:
    """The Mixture-of-Experts layers."""

    num_experts: int = 8
    """Experts in each MoE layer."""
    top_k: int = 2
    """Experts that each token chooses."""
    every: int = 2
    """Every how many blocks one is an MoE block: 1 all of them, 2 every other, as in GShard."""
    router: Literal["gshard", "switch", "top_k", "sigmoid_bias"] = "gshard"
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
    batch, device, communication, importance, z."""
    adaptive_balance: bool = False
    """Let each layer's weight of "balance" follow its drop rate (Skywork-MoE), from the one in losses towards at
    most 0.01."""

    def __post_init__(self) -> None:
        _positive("model.moe", self, "num_experts", "top_k", "every", "capacity_factor", "hidden", "group_size")
        _at_least_zero("model.moe", self, "shared_hidden")
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
    """Blocks; a multiple of moe.every."""
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
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type to compute in; parameters, routers and losses are float32."""
    remat: Literal["none", "full", "keep_all_to_all"] = "none"
    """What the backward pass makes again to save memory; keep_all_to_all: all but what came by all-to-all."""
    moe: MoEConfig = dataclasses.field(default_factory=MoEConfig)

    def __post_init__(self) -> None:
        _positive("model", self, "layers", "width", "heads", "kv_heads", "head_dim", "hidden", "rope_base")
        if self.layers % self.moe.every:
            up = math.ceil(self.layers / self.moe.every) * self.moe.every
            raise BadInput(
                f"model.layers = {self.layers} is not a multiple of model.moe.every = {self.moe.every}; use {up} layers"
            )
        if self.heads % self.kv_heads:
            raise BadInput(
                f"model.heads = {self.heads} is not a multiple of model.kv_heads = {self.kv_heads}; "
                f"use model.heads = {math.ceil(self.heads / self.kv_heads) * self.kv_heads}"
            )
        if self.head_dim % 2:
            raise BadInput(f"model.head_dim = {self.head_dim}: rotary positions turn pairs; use {self.head_dim + 1}")


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Text in."""

    path: str = "shakespeare"
    """A file, folder or glob of .txt, .jsonl or .parquet; "shakespeare" is the corpus inside the package."""
    column: str = "text"
    """Field of a JSONL line or column of a Parquet file that holds the text."""
    tokenizer: str = "bpe"
    """"bpe" (byte-level, trained on the training text), "bytes", or the path of a tokenizer.json."""
    vocab_size: int = 1024
    """Tokens of a trained BPE."""
    sequence_length: int = 256
    """Tokens in a training sequence."""
    validation_fraction: float = 0.05
    """Share of the documents held out; at least one."""

    def __post_init__(self) -> None:
        _positive("data", self, "vocab_size", "sequence_length")
        if self.tokenizer == "bpe" and self.vocab_size < 257:
            raise BadInput(f"data.vocab_size = {self.vocab_size}: 256 bytes and the end token need 257 or more")
        if not 0 < self.validation_fraction < 1:
            raise BadInput(f"data.validation_fraction = {self.validation_fraction}: must lie between 0 and 1; use 0.05")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """How weights move (docs/optimizers.md): the update rule, the learning rate's way, clipping, decay, averaging."""

    name: Literal["adamw", "adafactor", "lion", "muon"] = "adamw"
    """The update rule; muon: of the matrices inside the network, adamw of the rest."""
    schedule: Literal["cosine", "inverse_sqrt", "wsd"] = "cosine"
    """The learning rate's way down after a linear warm-up; wsd: flat, then linear at the end."""
    learning_rate: float = 3e-3
    """Peak learning rate; adafactor: relative to the size of each parameter."""
    warmup_steps: int = 50
    """Steps to the peak."""
    final_fraction: float = 0.1
    """Learning rate at the last step, as a share of the peak; cosine and wsd."""
    decay_start: int | None = None
    """inverse_sqrt: steps until the peak starts to fall; default: warmup_steps."""
    decay_fraction: float = 0.1
    """wsd: share of the run's steps in which the learning rate falls, the last ones."""
    beta1: float = 0.9
    """Decay of the first moment; adafactor: 0 keeps none."""
    beta2: float = 0.95
    """Decay of the second moment, with lion of the only one; adafactor has 1 - step^-0.8."""
    momentum: float = 0.95
    """muon: decay of the matrices' moment."""
    epsilon: float = 1e-8
    """Added to the root of the second moment; adamw."""
    weight_decay: float = 0.1
    """Decoupled decay of matrices; norms, biases and routers are exempt."""
    clip_norm: float | None = 1.0
    """Largest global norm of the gradient; null: any."""
    ema_decay: float | None = None
    """Average the weights of all steps, each step's counting this much of the next one's; null: use the last ones."""

    def __post_init__(self) -> None:
        _positive("optimizer", self, "learning_rate", "epsilon", "clip_norm", "decay_start", "decay_fraction")
        _at_least_zero("optimizer", self, "warmup_steps", "final_fraction", "weight_decay")
        for name in ("beta1", "beta2", "momentum"):
            if not 0 <= getattr(self, name) < 1:
                raise BadInput(f"optimizer.{name} = {getattr(self, name)}: must be 0 or more and below 1")
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise BadInput(f"optimizer.ema_decay = {self.ema_decay}: must lie between 0 and 1; use 0.999, or null")
        if self.decay_fraction > 1:
            raise BadInput(f"optimizer.decay_fraction = {self.decay_fraction}: is a share of the steps; use 0.1")
        if self.schedule == "inverse_sqrt":
            self._check_inverse_sqrt()
        elif self.decay_start is not None:
            raise BadInput(
                f"optimizer.decay_start = {self.decay_start} is of inverse_sqrt, and optimizer.schedule = "
                f"{self.schedule}; use inverse_sqrt, or leave decay_start null"
            )

    def _check_inverse_sqrt(self) -> None:
        if not (self.decay_start or self.warmup_steps):
            raise BadInput(
                "optimizer.schedule = inverse_sqrt falls from the end of the warm-up on, and optimizer.warmup_steps = "
                "0; use a decay_start of 10000"
            )
        if self.decay_start is not None and self.decay_start < self.warmup_steps:
            raise BadInput(
                f"optimizer.decay_start = {self.decay_start} comes before the end of the warm-up, "
                f"optimizer.warmup_steps = {self.warmup_steps}; use a decay_start of {self.warmup_steps} or more"
            )


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How long, how much at once, what to report."""

    steps: int = 400
    """Steps of the whole run."""
    batch_size: int = 16
    """Sequences in a step, over all devices."""
    log_every: int = 1
    """Steps between lines of metrics.jsonl."""
    zero_stage: Literal[1, 2, 3] = 3
    """What mesh.fsdp splits (ZeRO, arXiv 1910.02054): 1 optimizer state; 2 also gradients; 3 also parameters."""
    eval_every: int = 0
    """Steps between evaluations on held-out text; 0: only at the end."""
    trace_every: int = 0
    """Steps between routing traces in RUN_DIR/routing (each token's experts, by layer); 0: none."""
    sample_tokens: int = 150
    """Length of the text generated at the end; 0: none."""

    def __post_init__(self) -> None:
        _positive("train", self, "steps", "batch_size", "log_every")
        if self.zero_stage not in (1, 2, 3):
            raise BadInput(f"train.zero_stage = {self.zero_stage}: must be 1, 2 or 3; use 3")
        _at_least_zero("train", self, "eval_every", "trace_every", "sample_tokens")


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When to save and what to keep."""

    every: int = 100
    """Steps between checkpoints; the last step is always saved."""
    keep: int = 3
    """Newest checkpoints to keep; at least 2, so that a damaged one has an older to fall back to."""

    def __post_init__(self) -> None:
        _positive("checkpoint", self, "every")
        if self.keep < 2:
            raise BadInput(f"checkpoint.keep = {self.keep}: a damaged checkpoint needs an older one; use 2 or more")


@dataclasses.dataclass(frozen=True)
class Config:
    """A training run."""

    run_dir: str | None = None
    """Where the run lives; default: runs/<name of the config file>."""
    seed: int = 0
    """Of initial weights, data order and routing."""
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**32:
            raise BadInput(f"seed = {self.seed}: must be 0 or more and below 2**32")
        check_model_on_mesh(self.model, self.mesh, self.train.batch_size)
        shards, batch = self.mesh.batch_shards, self.train.batch_size
        if batch % shards:
            raise BadInput(
                f"train.batch_size = {batch} does not divide over mesh data * fsdp * expert = {shards}; "
                f"use a batch_size of {math.ceil(batch / shards) * shards}"
            )
        group = self.model.moe.group_size
        if group is not None and (batch // shards * self.data.sequence_length) % group:
            tokens = batch // shards * self.data.sequence_length
            raise BadInput(
                f"model.moe.group_size = {group} does not divide the {tokens} tokens that a device holds; "
                f"use {_divisor(tokens, group)}"
            )


def check_model_on_mesh(model: ModelConfig, mesh: MeshConfig, batch_size: int = 0) -> None:
    """Raise BadInput unless every dimension that the mesh splits divides over its axis.

    The axis that the message proposes suits every dimension on it, and ``batch_size``.
    """
    split = [
        ("model.moe.num_experts", model.moe.num_experts, "expert"),
        ("model.width", model.width, "fsdp"),
        ("model.heads", model.heads, "tensor"),
        ("model.kv_heads", model.kv_heads, "tensor"),
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
                f"{_divisor(common, parts)}"
            )
