"""A public model comes in, trains on eight devices, and goes out: transformers finds the loss that we find."""

import json
import subprocess
import sys

import numpy as np
import pytest

from gshardx.convert.__main__ import main
from gshardx.convert.calibrate import batches, forward_of, losses
from gshardx.convert.traces import load_theirs
from gshardx.infer.load import load_run
from gshardx.sharding import MeshConfig
from tests.convert.test_incoming import with_tokenizer
from tests.convert.test_public import PUBLIC

MESH = {"data": 2, "expert": 2, "tensor": 2}
SENTENCES = ["to be, or not to be.\n", "that is the question.\n", "whether it is nobler.\n"]


def sentences(seed, count):
    return ["".join(np.random.default_rng([seed, number]).choice(SENTENCES, 4)) for number in range(count)]


def loss_here(run, held_out, mesh):
    """Nats a token."""
    loaded = load_run(run, mesh)
    forward = forward_of(loaded)
    text = list(batches(loaded.tokenizer.encode_documents(held_out), 10_000))
    return sum(losses(np.asarray(forward(one)[0], np.float64), one) for one in text) / _predicted(text), text


def _predicted(text):
    return sum(int(one.valid[:, 1:].sum()) for one in text)


def loss_there(folder, text):
    """Nats a token, by transformers' own loss of the model's own forward pass."""
    import torch

    model, nats = load_theirs(folder), 0.0
    for one in text:
        labels = torch.from_numpy(np.where(one.valid, one.tokens, -100)).long()
        with torch.no_grad():
            loss = model(torch.from_numpy(one.tokens).long(), labels=labels, output_router_logits=False).loss
        nats += float(loss) * _predicted([one])
    return nats / _predicted(text)


@pytest.mark.sweep
@pytest.mark.parametrize("name", ["qwen2_moe", "phimoe"])
def test_after_fifty_steps_on_eight_devices_the_loss_is_the_same_there(name, tmp_path):
    """With experts, a gated shared one, and dense layers between; and with choices that training draws."""
    pytest.importorskip("transformers")
    theirs, run, back = with_tokenizer(PUBLIC / name, tmp_path / "theirs"), tmp_path / "run", tmp_path / "back"
    (tmp_path / "text.jsonl").write_text("\n".join(json.dumps({"text": one}) for one in sentences(0, 200)))
    assert main(["--from", str(theirs), "--to", str(run), "--dtype", "float32"]) == 0
    held_out = sentences(1, 16)
    before, _ = loss_here(run, held_out, MeshConfig(**MESH))
    flags = {f"mesh.{axis}": size for axis, size in MESH.items()} | {
        "data.path": tmp_path / "text.jsonl", "data.sequence_length": 32, "train.steps": 50, "train.batch_size": 8,
        "train.sample_tokens": 0, "optimizer.learning_rate": 0.01, "optimizer.warmup_steps": 5,
    }  # fmt: skip
    command = [sys.executable, "-m", "gshardx.train", "--config", str(run / "config.yaml")]
    command += [text for key, value in flags.items() for text in (f"--{key}", str(value))]
    out = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert out.returncode == 0, out.stderr
    assert main(["--from", str(run), "--to", str(back), "--verify", "--tokens", "128"]) == 0
    after, text = loss_here(run, held_out, MeshConfig(**MESH))
    assert load_run(run, MeshConfig()).step == 50
    assert after < before - 0.5, "it has learnt"
    assert loss_there(back, text) == pytest.approx(after, abs=1e-4)
