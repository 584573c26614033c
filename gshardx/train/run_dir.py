"""RUN_DIR and what is where in it; one trainer at a time."""

import dataclasses
import hashlib
from pathlib import Path

from gshardx.checkpoint.manifest import Manifest, read_manifest
from gshardx.checkpoint.store import finished_steps
from gshardx.cli import config_yaml, flatten, read_config
from gshardx.config import Config
from gshardx.data.tokenizer import Tokenizer
from gshardx.errors import BadInput

FREE_TO_CHANGE = (
    "run_dir",
    "mesh.",
    "train.zero_stage",
    "train.steps",
    "train.log_every",
    "train.eval_every",
    "train.sample_tokens",
    "train.trace_every",
    "checkpoint.",
    "guard.",
    "watchdog.",
    "profile.",
    "tracking.",
    "debug.",
    "data.on_error",
    "data.workers",
    "data.prefetch",
)
"""Keys that a resumed run may change: they alter what is done or where, not what each step computes.

train.steps also stretches the learning-rate schedule, which is said when it happens.
"""

FREE_AT_FIRST = (
    "model.dtype",
    "model.float32",
    "model.remat",
    "model.dropout",
    "model.moe.capacity_factor",
    "model.moe.group_size",
    "model.moe.dispatcher",
    "model.moe.wire",
    "model.moe.losses",
    "model.moe.adaptive_balance",
)
"""Keys of the model that may be others when training starts from given weights: these suit it all the same."""


@dataclasses.dataclass(frozen=True)
class RunDir:
    """Paths of a run."""

    path: Path

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def tensorboard(self) -> Path:
        return self.path / "tensorboard"

    @property
    def tokenizer(self) -> Path:
        return self.path / "tokenizer.json"

    @property
    def expert_load(self) -> Path:
        return self.path / "expert_load.jsonl"

    @property
    def goodput(self) -> Path:
        return self.path / "goodput.json"

    @property
    def events(self) -> Path:
        return self.path / "events.jsonl"

    @property
    def profile(self) -> Path:
        return self.path / "profile"

    @property
    def routing(self) -> Path:
        return self.path / "routing"

    @property
    def hlo(self) -> Path:
        return self.path / "hlo"

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def has_checkpoints(self) -> bool:
        return self.checkpoints.is_dir() and any(self.checkpoints.iterdir())

    @property
    def is_untrained(self) -> bool:
        """Whether all it has are weights to start from, at step 0 (gshardx.convert writes such runs)."""
        return self.has_checkpoints and finished_steps(self.checkpoints) == [0] and self.starts_from_weights

    @property
    def starts_from_weights(self) -> bool:
        manifest = read_manifest(self.checkpoints / "0")
        return manifest is not None and not holds_a_state(manifest)

    def write_config(self, config: Config) -> None:
        scratch = self.config.with_suffix(".tmp")
        scratch.write_text(config_yaml(config))
        scratch.replace(self.config)

    def check_config(self, config: Config) -> list[str]:
        """Lines on harmless changes since the run's last start.

        Raises:
            BadInput: a value that decides what a step computes has changed.
        """
        before = dict(flatten(dataclasses.asdict(read_config(self.config))))
        now = dict(flatten(dataclasses.asdict(config)))
        changed = [key for key in now | before if now.get(key) != before.get(key)]
        if self.is_untrained:
            bad = [key for key in changed if key.startswith("model.") and not key.startswith(FREE_AT_FIRST)]
        else:
            bad = [key for key in changed if not key.startswith(FREE_TO_CHANGE)]
        if bad:
            said = "; ".join(f"{key} = {before.get(key)}, now {now.get(key)}" for key in bad[:3])
            how = "came" if self.is_untrained else "was trained"
            raise BadInput(f"run_dir {self.path} {how} with {said}; use the old value or another --run_dir")
        notes = [f"{key}: {before[key]} -> {now[key]}" for key in changed if key != "run_dir"]
        if "train.steps" in changed:
            notes.append("the learning-rate schedule now ends at the new train.steps")
        return notes

    def keep_tokenizer(self, tokenizer: Tokenizer) -> str:
        """Write tokenizer.json, or check that the run's own is the same; return its SHA-256.

        Raises:
            BadInput: the run was trained with another tokenizer, or the file is damaged.
        """
        wanted = tokenizer.text
        try:
            found = self.tokenizer.read_text(encoding="utf-8")
        except FileNotFoundError:
            self.tokenizer.write_text(wanted, encoding="utf-8")
            found = wanted
        except UnicodeDecodeError as error:
            raise BadInput(f"{self.tokenizer}: damaged (not UTF-8); delete it and run the same command") from error
        except OSError as error:
            raise BadInput(
                f"{self.tokenizer}: can't be read ({error.strerror}); delete it and run the same command"
            ) from error
        if found != wanted:
            raise BadInput(
                f"{self.tokenizer}: differs from the tokenizer that the config and text give; if it is damaged, delete "
                f"it, and if the text changed, use another --run_dir"
            )
        return hashlib.sha256(wanted.encode()).hexdigest()


def holds_a_state(manifest: Manifest) -> bool:
    """Whether a step is one of training, and not weights alone."""
    return any(name.startswith("optimizer/") for name in manifest.arrays)
