"""RUN_DIR: one trainer at a time, and no quiet change of what is trained."""

import dataclasses
import hashlib

import pytest

from gshardx.cli import flatten, read_config
from gshardx.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    ModelConfig,
    MoEConfig,
    OptimizerConfig,
    TrainConfig,
)  # fmt: skip
from gshardx.data.tokenizer import build_tokenizer, load_tokenizer
from gshardx.errors import BadInput
from gshardx.sharding import MeshConfig
from gshardx.train.run_dir import FREE_TO_CHANGE, RunDir


@pytest.fixture
def run(tmp_path):
    return RunDir(tmp_path / "run")


@pytest.fixture
def written(run):
    run.path.mkdir()
    run.write_config(Config())
    return run


def test_the_paths_of_a_run(run):
    names = {path.name for path in (run.config, run.metrics, run.tokenizer, run.tensorboard, run.checkpoints)}
    assert names == {"config.yaml", "metrics.jsonl", "tokenizer.json", "tensorboard", "checkpoints"}
    assert {path.parent for path in (run.config, run.metrics, run.checkpoints)} == {run.path}


def test_a_run_has_checkpoints_once_there_is_something_in_their_folder(run):
    assert not run.has_checkpoints
    run.checkpoints.mkdir(parents=True)
    assert not run.has_checkpoints
    (run.checkpoints / "100").mkdir()
    assert run.has_checkpoints


def test_the_written_config_is_the_config(run):
    run.path.mkdir()
    config = Config(run_dir="runs/x", seed=3, mesh=MeshConfig(expert=8), optimizer=OptimizerConfig(learning_rate=1e-5))
    run.write_config(Config())
    run.write_config(config)
    assert read_config(run.config) == config
    assert [path.name for path in run.path.iterdir()] == ["config.yaml"]  # no scratch file


def test_the_same_config_says_nothing(written):
    assert written.check_config(Config()) == []


def test_a_changed_learning_rate_is_refused_with_old_and_new(written):
    with pytest.raises(BadInput) as caught:
        written.check_config(Config(optimizer=OptimizerConfig(learning_rate=0.01)))
    message = str(caught.value)
    assert "optimizer.learning_rate = 0.003, now 0.01" in message
    assert str(written.path) in message
    assert "--run_dir" in message


def another(value):
    """A valid value unlike ``value``."""
    if isinstance(value, str):
        other = {"all": "random", "gather": "einsum", "swiglu": "relu", "float32": "bfloat16"}
        return other.get(value, f"{value}.other")
    if isinstance(value, list):
        return [*value, "logits"]
    if isinstance(value, float) and value <= 1:
        return value / 2 or 0.25
    return 64 if value is None else value * 2 if value > 1 else value + 1


def changed(config, key):
    """``config`` with another value under the dotted ``key``."""
    name, _, rest = key.partition(".")
    value = getattr(config, name)
    if isinstance(value, dict):
        return dataclasses.replace(config, **{name: {**value, rest: another(value[rest])}})
    return dataclasses.replace(config, **{name: changed(value, rest) if rest else another(value)})


KEYS = [key for key, _ in flatten(dataclasses.asdict(Config()))]
FREE = [key for key in KEYS if key.startswith(FREE_TO_CHANGE)]


def with_room_to_change(key):
    """A config in which ``key`` may have another value: some fields are of one schedule, or of a mixture."""
    optimizer = OptimizerConfig(ema_decay=0.5)
    if key == "optimizer.decay_start":
        optimizer = OptimizerConfig(schedule="inverse_sqrt", decay_start=100)
    data = DataConfig(vocab_size=2048)
    if key == "data.temperature":
        data = DataConfig(mixture={"a": 1.0}, temperature=2.0)
    moe = MoEConfig(every=1) if key == "model.moe.dense_first" else MoEConfig()
    train = TrainConfig(batch_size=64, zero_stage=1)
    return Config(model=ModelConfig(moe=moe), data=data, optimizer=optimizer, train=train)


@pytest.mark.parametrize("key", [key for key in KEYS if key not in FREE])
def test_a_change_of_anything_that_a_step_computes_is_refused(run, key):
    run.path.mkdir()
    before = with_room_to_change(key)
    run.write_config(before)
    with pytest.raises(BadInput, match=rf"{key} = .*, now "):
        run.check_config(changed(before, key))


@pytest.mark.parametrize("key", [key for key in FREE if key != "run_dir"])
def test_a_change_of_place_or_length_is_allowed_and_told(run, key):
    run.path.mkdir()
    before = with_room_to_change(key)
    run.write_config(before)
    old, new = (dict(flatten(dataclasses.asdict(config)))[key] for config in (before, changed(before, key)))
    notes = run.check_config(changed(before, key))
    assert notes[0] == f"{key}: {old} -> {new}"
    assert any("learning-rate schedule" in note for note in notes) == (key == "train.steps")


def test_a_moved_run_is_the_same_run(written):
    assert written.check_config(Config(run_dir="elsewhere")) == []


def test_what_may_change_is_where_and_how_long_and_what_is_reported():
    assert {key.split(".")[0] for key in FREE} == {
        "run_dir", "mesh", "train", "checkpoint", "data", "guard", "watchdog", "profile", "tracking", "debug"
    }  # fmt: skip
    assert {key for key in FREE if key.startswith("data.")} == {"data.on_error", "data.workers", "data.prefetch"}
    assert "train.batch_size" not in FREE
    assert "seed" not in FREE


def test_many_changes_are_still_one_line_that_names_the_first(written):
    config = Config(
        seed=1,
        optimizer=OptimizerConfig(learning_rate=0.1, beta1=0.5, beta2=0.5),
        checkpoint=CheckpointConfig(keep=9),
    )
    with pytest.raises(BadInput) as caught:
        written.check_config(config)
    assert "seed = 0, now 1" in str(caught.value)
    assert "checkpoint.keep" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_damaged_config_of_a_run_is_named(written):
    written.config.write_text("model: [1\n")
    with pytest.raises(BadInput, match=r"run/config\.yaml: .*line 1"):
        written.check_config(Config())


@pytest.fixture
def tokenizer():
    return build_tokenizer("bytes", 0, [])


def test_a_first_start_writes_the_tokenizer_and_a_second_finds_it(written, tokenizer):
    digest = written.keep_tokenizer(tokenizer)
    assert digest == hashlib.sha256(tokenizer.text.encode()).hexdigest()
    assert load_tokenizer(written.tokenizer).text == tokenizer.text
    before = written.tokenizer.stat().st_mtime_ns
    assert written.keep_tokenizer(tokenizer) == digest
    assert written.tokenizer.stat().st_mtime_ns == before


@pytest.mark.parametrize(
    "damage", [lambda text: text[: len(text) // 2], lambda text: text.replace("256", "255"), lambda text: ""]
)
def test_a_damaged_or_changed_tokenizer_is_named_with_a_mend_that_works(written, tokenizer, damage):
    digest = written.keep_tokenizer(tokenizer)
    written.tokenizer.write_text(damage(tokenizer.text))
    with pytest.raises(BadInput, match=r"tokenizer\.json: differs .* delete") as caught:
        written.keep_tokenizer(tokenizer)
    assert str(written.tokenizer) in str(caught.value)
    written.tokenizer.unlink()
    assert written.keep_tokenizer(tokenizer) == digest


def test_a_tokenizer_that_is_not_text_is_named(written, tokenizer):
    written.tokenizer.write_bytes(b"\xff\xfe")
    with pytest.raises(BadInput, match=r"tokenizer\.json: damaged \(not UTF-8\)"):
        written.keep_tokenizer(tokenizer)


def test_a_tokenizer_that_cannot_be_read_is_named(written, tokenizer):
    written.tokenizer.mkdir()
    with pytest.raises(BadInput, match=r"tokenizer\.json"):
        written.keep_tokenizer(tokenizer)
