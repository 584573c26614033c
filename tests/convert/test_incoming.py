"""What was converted is a run: it answers, and training goes on from it."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest
import tokenizers
from tokenizers import models, pre_tokenizers

from gshardx.checkpoint.manifest import damage, read_manifest
from gshardx.checkpoint.places import find
from gshardx.cli import config_yaml, read_config
from gshardx.convert.__main__ import main
from gshardx.convert.incoming import convert_in
from gshardx.convert.model import Model
from gshardx.errors import BadInput
from gshardx.infer.load import load_run
from gshardx.sharding import MeshConfig
from gshardx.train.guard import Guard
from gshardx.train.loop import train
from gshardx.train.run_dir import RunDir
from tests.convert.test_public import PUBLIC

LETTERS = "abcdefghijklmnopqrstuvwxyz ,.\n"


def with_tokenizer(folder, target, extra=0):
    """A copy of a public model with a tokenizer of single letters."""
    shutil.copytree(folder, target)
    vocab = {token: number for number, token in enumerate(["</s>", "<unk>", *LETTERS, *map(str, range(extra))])}
    tokenizer = tokenizers.Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.add_special_tokens(["</s>"])
    tokenizer.save(str(target / "tokenizer.json"))
    (target / "tokenizer_config.json").write_text("{}")
    return target


@pytest.fixture(scope="module", params=["mixtral", pytest.param("llama", marks=pytest.mark.slow)])
def converted(request, tmp_path_factory):
    place = tmp_path_factory.mktemp("converted")
    theirs = with_tokenizer(PUBLIC / request.param, place / "theirs")
    assert main(["--from", str(theirs), "--to", str(place / "run")]) == 0
    return place


def test_a_run_is_loaded_with_the_same_weights_on_any_mesh(converted):
    mesh = MeshConfig(fsdp=4, tensor=2)
    run, model = load_run(converted / "run", mesh), Model.from_pretrained(converted / "theirs", mesh)
    assert (run.step, run.blueprint.vocab, run.config.model) == (0, 48, model.config)
    assert run.tokenizer.vocab_size == 2 + len(LETTERS)
    jax.tree.map(np.testing.assert_array_equal, run.variables.params, model.variables.params)


def test_its_arrays_are_as_wide_as_the_tensors_were_and_have_checksums(converted):
    saved = find(converted / "run", None)
    shapes = saved.manifest.arrays
    assert {dtype for name, (_, dtype) in shapes.items() if "router" not in name} == {"bfloat16"}
    array = saved.folder / "params" / "final_norm.scale" / "c" / "0"
    content = bytearray(array.read_bytes())
    content[3] ^= 1
    array.write_bytes(content)
    try:
        assert "final_norm.scale is damaged" in damage(saved.folder, saved.manifest.checksum, saved.manifest.files)
        with pytest.raises(BadInput, match=r"final_norm.scale is damaged"):
            main(["--from", str(converted / "run"), "--to", str(converted / "back")])
    finally:
        content[3] ^= 1
        array.write_bytes(content)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    draw = np.random.default_rng(0)
    documents = ["".join(draw.choice(list(LETTERS[:28]), 90)) for _ in range(30)]
    path.write_text("\n".join(json.dumps({"text": text}) for text in documents))
    return path


def tuned(converted, text, target, model=None, **optimizer):
    """Two steps of training in a copy of the run; the config."""
    shutil.copytree(converted / "run", target)
    config = read_config(target / "config.yaml")
    config = dataclasses.replace(
        config,
        model=model or config.model,
        data=dataclasses.replace(config.data, path=str(text), sequence_length=16),
        optimizer=dataclasses.replace(config.optimizer, warmup_steps=1, **optimizer),
        train=dataclasses.replace(config.train, steps=2, batch_size=4, sample_tokens=0),
    )
    assert train(config, RunDir(target), "the command") == 0
    return config


@pytest.mark.slow
def test_training_starts_from_the_weights(converted, text, tmp_path, capsys):
    """With a learning rate too small to move a float, the last step's weights are the first's."""
    tuned(converted, text, tmp_path / "run", learning_rate=1e-30, weight_decay=0.0)
    assert f"starting from the weights in {tmp_path / 'run' / 'checkpoints' / '0'}" in capsys.readouterr().out
    run, before = load_run(tmp_path / "run", MeshConfig()), load_run(converted / "run", MeshConfig())
    assert run.step == 2
    jax.tree.map(np.testing.assert_array_equal, run.variables.params, before.variables.params)
    assert main(["--from", str(tmp_path / "run"), "--to", str(tmp_path / "back"), "--dtype", "bfloat16"]) == 0
    for path in (PUBLIC / converted_name(converted)).glob("*.safetensors"):
        assert (tmp_path / "back" / path.name).read_bytes() == path.read_bytes()


@pytest.mark.slow
def test_so_does_the_routers_state(text, tmp_path):
    """Two updates move a bias by 0.001 each, from where it was."""
    theirs = with_tokenizer(PUBLIC / "deepseek_v3", tmp_path / "theirs")
    assert main(["--from", str(theirs), "--to", str(tmp_path / "run")]) == 0
    tuned(tmp_path, text, tmp_path / "tuned")
    before, after = (load_run(tmp_path / name, MeshConfig()).variables.router.bias for name in ("run", "tuned"))
    moved = np.abs(np.asarray(after) - np.asarray(before))
    assert 0.0005 < moved.max() < 0.0021
    assert np.abs(before).max() > 0.05


@pytest.mark.slow
def test_damaged_weights_are_not_replaced_by_new_ones(converted, text, tmp_path):
    shutil.copytree(converted / "run", tmp_path / "run")
    array = tmp_path / "run" / "checkpoints" / "0" / "params" / "final_norm.scale" / "c" / "0"
    array.write_bytes(bytes(len(array.read_bytes())))
    with pytest.raises(BadInput, match="the weights that it came with are damaged; convert them again"):
        tuned(tmp_path, text, tmp_path / "target")


@pytest.mark.slow
def test_a_loss_that_spikes_goes_back_to_the_weights(converted, text, tmp_path, monkeypatch, capsys):
    """The second step counts as one, once."""
    spikes = iter([False, True])
    monkeypatch.setattr(Guard, "_is_spike", lambda self, step, loss: next(spikes, False))
    tuned(converted, text, tmp_path / "run", learning_rate=1e-30, weight_decay=0.0)
    assert "back to step 0 without the 2 batches since (1 of" in capsys.readouterr().out
    run, before = load_run(tmp_path / "run", MeshConfig()), load_run(converted / "run", MeshConfig())
    jax.tree.map(np.testing.assert_array_equal, run.variables.params, before.variables.params)


def converted_name(converted):
    return json.loads((converted / "theirs" / "config.json").read_text())["model_type"]


@pytest.mark.slow
def test_what_the_weights_compute_can_not_be_changed(converted, text, tmp_path):
    model = dataclasses.replace(read_config(converted / "run" / "config.yaml").model, rope_base=5.0)
    with pytest.raises(BadInput, match=r"came with model.rope_base = .*, now 5.0"):
        tuned(converted, text, tmp_path / "run", model)


def test_a_tokenizer_that_does_not_fit_is_not_taken(tmp_path):
    theirs = with_tokenizer(PUBLIC / "mixtral", tmp_path / "theirs", extra=40)
    with pytest.raises(BadInput, match=r"tokenizer.json: 72 tokens, and config.json has vocab_size = 48"):
        convert_in(theirs, tmp_path / "run", None)
    assert [path.name for path in tmp_path.iterdir()] == ["theirs"]


def test_weights_may_be_made_wider(tmp_path):
    convert_in(PUBLIC / "mixtral", tmp_path / "run", "float32", lambda line: None)
    assert {dtype for _, dtype in find(tmp_path / "run", None).manifest.arrays.values()} == {"float32"}
    assert read_config(tmp_path / "run" / "config.yaml").model.dtype == "float32"


KILLED = """
import os, signal, sys
from gshardx.convert import incoming
from gshardx.convert.__main__ import main
incoming.write_manifest = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
main(sys.argv[1:])
"""


@pytest.mark.slow
def test_what_a_killed_conversion_left_is_replaced(tmp_path):
    command = [sys.executable, "-c", KILLED, "--from", str(PUBLIC / "mixtral"), "--to", str(tmp_path / "run")]
    assert subprocess.run(command, capture_output=True, timeout=120).returncode == -signal.SIGKILL
    assert os.listdir(tmp_path) == [".run.part"]
    convert_in(PUBLIC / "mixtral", tmp_path / "run", None, lambda line: None)
    assert os.listdir(tmp_path) == ["run"]
    assert read_manifest(tmp_path / "run" / "checkpoints" / "0") is not None


def test_what_positions_beyond_the_first_length_do_is_said(tmp_path):
    said = []
    convert_in(PUBLIC / "phimoe", tmp_path / "run", None, said.append)
    assert said[1].endswith("positions turn as in texts of at most 128 tokens, in longer ones too (docs/convert.md)")


def test_its_config_is_read_back(converted):
    config = read_config(converted / "run" / "config.yaml")
    assert config_yaml(config) == (converted / "run" / "config.yaml").read_text()
    assert config.model.moe.capacity_factor is None, "nothing is dropped"
