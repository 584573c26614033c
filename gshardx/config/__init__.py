"""One tree of frozen dataclasses that describes a run, and the rules that its values keep.

Every command reads it from a YAML file and ``--section.field`` overrides (gshardx/cli.py); RUN_DIR/config.yaml holds
what ran. Values that contradict each other raise BadInput, naming both and a value that would work.
"""

import dataclasses
import math
from typing import Literal

from gshardx.config.checks import at_least_zero, divisor, positive, share
from gshardx.config.model import LOSSES, ModelConfig, MoEConfig, check_model_on_mesh
from gshardx.config.run import (
    CheckpointConfig,
    DebugConfig,
    GuardConfig,
    ProfileConfig,
    TrackingConfig,
    WatchdogConfig,
)  # fmt: skip
from gshardx.errors import BadInput
from gshardx.sharding import MeshConfig

PACKAGED_TEXT = "shakespeare"


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
        positive("data", self, "vocab_size", "sequence_length", "temperature")
        at_least_zero("data", self, "workers", "prefetch")
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
        positive("optimizer", self, "learning_rate", "epsilon", "clip_norm", "decay_start", "decay_fraction")
        at_least_zero("optimizer", self, "warmup_steps", "final_fraction", "weight_decay")
        share("optimizer", self, "beta1", "beta2", "momentum")
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
        positive("train", self, "steps", "batch_size", "log_every", "accumulation_steps")
        share("train", self, "label_smoothing")
        if self.zero_stage not in (1, 2, 3):
            raise BadInput(f"train.zero_stage = {self.zero_stage}: must be 1, 2 or 3; use 3")
        at_least_zero("train", self, "eval_every", "trace_every", "sample_tokens", "z_loss")


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
    watchdog: WatchdogConfig = dataclasses.field(default_factory=WatchdogConfig)
    profile: ProfileConfig = dataclasses.field(default_factory=ProfileConfig)
    tracking: TrackingConfig = dataclasses.field(default_factory=TrackingConfig)
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
            f"{' of a micro-batch' if steps > 1 else ''}; use {divisor(tokens, group)}"
        )


__all__ = [
    "LOSSES", "PACKAGED_TEXT", "CheckpointConfig", "Config", "DataConfig", "DebugConfig",
    "GuardConfig", "MeshConfig", "ModelConfig", "MoEConfig", "OptimizerConfig", "ProfileConfig", "TrackingConfig",
    "TrainConfig", "WatchdogConfig", "check_model_on_mesh",
]  # fmt: skip
