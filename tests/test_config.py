"""Configs: what contradicts itself is refused with a mend that works, and what is fine survives YAML."""

import dataclasses
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gshardx.cli import config_yaml, flatten, read_config
from gshardx.config import Config, ModelConfig, check_model_on_mesh
from gshardx.errors import BadInput
from gshardx.sharding import MeshConfig

DEFAULTS = dict(flatten(dataclasses.asdict(Config())))
FREE = {"model.rope": {}, "model.attention": {}, "model.moe.router_options": {}, "model.moe.losses": {"balance": 0.01}}
"""Keys that hold names and values of the user's choice."""
DEFAULTS = {key: value for key, value in DEFAULTS.items() if not key.startswith(tuple(FREE))} | FREE
NUMBERS = [key for key, value in DEFAULTS.items() if type(value) in (int, float)] + ["model.moe.group_size"]
FLOATS = [key for key, value in DEFAULTS.items() if isinstance(value, float)]


def build(values, kind=Config, prefix=""):
    """A config of dotted ``values`` over the defaults."""
    assert set(values) <= set(DEFAULTS)
    made = {}
    for field in dataclasses.fields(kind):
        key = prefix + field.name
        if dataclasses.is_dataclass(field.type):
            made[field.name] = build(values, field.type, f"{key}.")
        elif key in values:
            made[field.name] = values[key]
    return kind(**made)


def complaint(values):
    with pytest.raises(BadInput) as caught:
        build(values)
    return str(caught.value)


def mends(message, key):
    """Every mend in a message as a key and a value; ``key`` is the one meant where the message gives only a number."""
    advice = message.rsplit("; use ", 1)[1]
    named = re.findall(r"([a-z][\w.]+) = ([\d.]+)", advice) or [(key, re.search(r"\d+(\.\d+)?", advice).group())]
    return [(name, type(DEFAULTS[name] or 0)(number)) for name, number in named]


IMPOSSIBLE = [
    # what is set, what the message must name, what its bare number is for
    ({"model.moe.num_experts": 4, "mesh.expert": 8}, ["model.moe.num_experts = 4", "mesh.expert = 8"], None),
    (
        {"model.moe.num_experts": 12, "mesh.expert": 16, "train.batch_size": 48},
        ["num_experts = 12", "expert = 16"],
        None,
    ),
    ({"model.width": 68, "mesh.fsdp": 8}, ["model.width = 68", "mesh.fsdp = 8"], None),
    ({"model.moe.hidden": 257, "mesh.tensor": 2}, ["model.moe.hidden = 257", "mesh.tensor = 2"], None),
    ({"model.kv_heads": 1, "mesh.tensor": 2}, ["model.kv_heads = 1", "mesh.tensor = 2"], None),
    ({"train.batch_size": 12, "mesh.expert": 8}, ["train.batch_size = 12", "mesh", "= 8"], "train.batch_size"),
    (
        {"train.batch_size": 16, "train.accumulation_steps": 3},
        ["train.batch_size = 16", "train.accumulation_steps = 3"],
        "train.batch_size",
    ),
    (
        {"train.batch_size": 8, "train.accumulation_steps": 4, "model.moe.group_size": 1024},
        ["group_size = 1024", "512 tokens", "micro-batch"],
        "model.moe.group_size",
    ),
    (
        {"train.batch_size": 1, "mesh.data": 2, "mesh.fsdp": 2, "mesh.expert": 2},
        ["train.batch_size = 1 ", "data * fsdp * expert = 8"],
        "train.batch_size",
    ),
    ({"model.moe.top_k": 9}, ["model.moe.top_k = 9", "model.moe.num_experts = 8"], "model.moe.top_k"),
    ({"model.layers": 3}, ["model.layers = 3", "model.moe.every = 2"], "model.layers"),
    ({"model.layers": 2, "model.moe.every": 5}, ["model.layers = 2", "model.moe.every = 5"], "model.layers"),
    ({"model.heads": 4, "model.kv_heads": 3}, ["model.heads = 4", "model.kv_heads = 3"], "model.kv_heads"),
    ({"model.heads": 4, "model.kv_heads": 8}, ["model.heads = 4", "model.kv_heads = 8"], "model.kv_heads"),
    ({"model.head_dim": 33}, ["model.head_dim = 33"], "model.head_dim"),
    ({"model.moe.group_size": 300}, ["model.moe.group_size = 300", "4096 tokens"], "model.moe.group_size"),
    ({"model.moe.group_size": 10_000}, ["model.moe.group_size = 10000", "4096 tokens"], "model.moe.group_size"),
    (
        {"model.moe.group_size": 1024, "mesh.expert": 8, "data.sequence_length": 300},
        ["model.moe.group_size = 1024", "600 tokens"],
        "model.moe.group_size",
    ),
    (
        {"optimizer.schedule": "inverse_sqrt", "optimizer.warmup_steps": 0},
        ["schedule = inverse_sqrt", "warmup_steps = 0"],
        "optimizer.decay_start",
    ),
    (
        {"optimizer.schedule": "inverse_sqrt", "optimizer.decay_start": 10},
        ["decay_start = 10 ", "warmup_steps = 50"],
        "optimizer.decay_start",
    ),
    ({"optimizer.decay_fraction": 1.5}, ["optimizer.decay_fraction = 1.5"], "optimizer.decay_fraction"),
    ({"checkpoint.keep": 1}, ["checkpoint.keep = 1"], "checkpoint.keep"),
    ({"checkpoint.keep": 0}, ["checkpoint.keep = 0"], "checkpoint.keep"),
    ({"mesh.expert": 0}, ["mesh.expert = 0"], "mesh.expert"),
    ({"mesh.tensor": -2}, ["mesh.tensor = -2"], "mesh.tensor"),
    ({"data.validation_fraction": 0.0}, ["data.validation_fraction = 0.0"], "data.validation_fraction"),
    ({"data.validation_fraction": 1.0}, ["data.validation_fraction = 1.0"], "data.validation_fraction"),
    ({"data.validation_fraction": 5}, ["data.validation_fraction = 5"], "data.validation_fraction"),
]


def name_of(case):
    return " ".join(f"{key.rsplit('.', 1)[1]}={value}" for key, value in case[0].items())


@pytest.mark.parametrize("case", IMPOSSIBLE, ids=name_of)
def test_a_contradiction_names_both_values_and_mends_that_work(case):
    values, named, key = case
    message = complaint(values)
    for part in named:
        assert part in message
    found = mends(message, key)
    assert found
    for name, value in found:
        build({**values, name: value})


def test_a_schedule_s_own_field_needs_that_schedule():
    message = complaint({"optimizer.decay_start": 100, "optimizer.schedule": "wsd"})
    assert "optimizer.decay_start = 100" in message
    assert "optimizer.schedule = wsd; use inverse_sqrt, or leave decay_start null" in message
    build({"optimizer.decay_start": 100, "optimizer.schedule": "inverse_sqrt"})


@pytest.mark.parametrize("decay", [0.0, 1.0, -1.0, float("nan")])
def test_an_average_counts_its_steps_more_than_not_and_less_than_fully(decay):
    message = complaint({"optimizer.ema_decay": decay})
    assert f"optimizer.ema_decay = {decay}" in message
    assert "use 0.999, or null" in message


def test_weights_that_follow_drops_need_drops():
    message = complaint({"model.moe.adaptive_balance": True, "model.moe.capacity_factor": None})
    assert "model.moe.adaptive_balance" in message
    assert "model.moe.capacity_factor = null" in message


@pytest.mark.parametrize("losses", [{"balanc": 1.0}, {"balance": -1.0}, {"z": float("nan")}], ids=str)
def test_a_loss_is_known_and_its_weight_a_weight(losses):
    message = complaint({"model.moe.losses": losses})
    assert f"model.moe.losses.{next(iter(losses))}" in message


def test_a_vocabulary_too_small_for_the_bytes_names_the_smallest():
    message = complaint({"data.vocab_size": 256})
    assert "data.vocab_size = 256" in message
    assert "257 or more" in message
    build({"data.vocab_size": 257})
    build({"data.vocab_size": 16, "data.tokenizer": "bytes"})  # means nothing there


@settings(max_examples=150, deadline=None)
@given(
    st.fixed_dictionaries(
        {
            "model.moe.num_experts": st.integers(1, 24),
            "model.moe.top_k": st.integers(1, 4),
            "model.moe.every": st.integers(1, 4),
            "model.moe.group_size": st.none() | st.integers(1, 600),
            "model.layers": st.integers(1, 9),
            "model.heads": st.integers(1, 12),
            "model.kv_heads": st.integers(1, 12),
            "model.head_dim": st.integers(1, 40),
            "mesh.data": st.integers(0, 4),
            "mesh.fsdp": st.integers(1, 4),
            "mesh.expert": st.integers(1, 16),
            "mesh.tensor": st.integers(1, 6),
            "train.batch_size": st.integers(1, 64),
            "checkpoint.keep": st.integers(1, 3),
        }
    )
)
def test_following_the_advice_line_after_line_ends_in_a_config_that_works(values):
    bare = {
        "batch_size =": "train.batch_size",
        "top_k =": "model.moe.top_k",
        "layers =": "model.layers",
        "heads =": "model.kv_heads",
        "head_dim =": "model.head_dim",
        "group_size =": "model.moe.group_size",
        "keep =": "checkpoint.keep",
        "mesh.data =": "mesh.data",
    }
    for _ in range(20):
        try:
            build(values)
        except BadInput as error:
            key = next((full for part, full in bare.items() if part in str(error)), None)
            values = {**values, **dict(mends(str(error), key)[:1])}
        else:
            return
    pytest.fail(f"still wrong after 20 mends: {complaint(values)}")


@pytest.mark.parametrize(
    "values",
    [
        {"model.heads": 6, "model.kv_heads": 2, "mesh.tensor": 4},
        {"model.heads": 6, "model.kv_heads": 3, "mesh.tensor": 2},
        {"model.moe.num_experts": 12, "mesh.expert": 8},
        {"model.width": 100, "mesh.fsdp": 8},
    ],
    ids=str,
)
def test_a_mend_of_the_mesh_breaks_nothing_else(values):
    proposed = mends(complaint(values), None)
    assert proposed
    for name, value in proposed:
        build({**values, name: value})


@pytest.mark.parametrize("key", NUMBERS)
def test_no_number_may_be_negative(key):
    assert f"{key} = -1" in complaint({key: -1})


@pytest.mark.parametrize("key", FLOATS)
def test_no_number_may_be_nan(key):
    assert f"{key} = nan" in complaint({key: float("nan")})


@pytest.mark.parametrize("key", FLOATS)
def test_no_number_may_be_infinite(key):
    assert f"{key} = inf" in complaint({key: float("inf")})


def test_a_trained_model_is_held_against_another_mesh_on_its_own():
    check_model_on_mesh(ModelConfig(), MeshConfig(expert=8, tensor=2))
    with pytest.raises(BadInput, match=r"model\.moe\.num_experts = 8 .* mesh\.expert = 3"):
        check_model_on_mesh(ModelConfig(), MeshConfig(expert=3))


def test_the_tree_has_at_most_a_hundred_fields_and_each_says_what_it_is():
    assert len(DEFAULTS) <= 100
    kinds = [Config, *(field.type for field in dataclasses.fields(Config) if dataclasses.is_dataclass(field.type))]
    assert all(kind.__doc__ and not kind.__doc__.startswith(f"{kind.__name__}(") for kind in kinds)


def test_a_few_steps_of_a_long_run_may_be_tried_without_a_shorter_warm_up():
    assert build({"train.steps": 5}).optimizer.warmup_steps > 5


def test_configs_cannot_be_changed_after_their_check():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().seed = 1


@settings(max_examples=15, deadline=None)
@given(
    st.fixed_dictionaries(
        {
            "run_dir": st.none()
            | st.sampled_from(["runs/a b", "007", "über", "no: yes", "[x]", "2026-01-01", "", " "]),
            "seed": st.integers(0, 2**31),
            "data.path": st.sampled_from(
                ["null", "on", "*.txt", "~/x", "# a", "'", '"', "a\nb", "\t", "漢", "-", "{", "!"]
            ),
            "data.column": st.text(st.characters(codec="ascii", categories=["L", "P"]), min_size=1),
            "model.moe.group_size": st.sampled_from([None, 64, 512]),
            "model.moe.router_options": st.sampled_from([{}, {"second_expert": "random"}, {"threshold": 0.25}]),
            "model.moe.losses": st.sampled_from([{}, {"balance": 0.5}, {"z": 1e-3, "balance": 0.01}]),
            "model.moe.capacity_factor": st.sampled_from([None, 1.0]),
            "mesh.expert": st.sampled_from([1, 2, 8]),
            "optimizer.learning_rate": st.floats(1e-12, 1e3),
            "optimizer.epsilon": st.floats(min_value=5e-324, max_value=1.0),
            "optimizer.warmup_steps": st.integers(0, 400),
        }
    )
)
def test_a_config_survives_yaml(tmp_path_factory, values):
    config = build(values)
    file = tmp_path_factory.mktemp("yaml") / "config.yaml"
    file.write_text(config_yaml(config), encoding="utf-8")
    assert read_config(file) == config


@pytest.mark.parametrize("name", ["1e3", "1e-4", "1E5"])
def test_a_name_that_looks_like_a_number_survives_yaml(tmp_path, name):
    config = Config(run_dir=name)
    (tmp_path / "config.yaml").write_text(config_yaml(config))
    assert read_config(tmp_path / "config.yaml") == config
