"""The average of the weights: by hand, through training, on disk, in evaluation and in inference; and states that
move from mesh to mesh with every optimizer."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gshardx.checkpoint.store import CheckpointStore, load
from gshardx.config import CheckpointConfig, Config, DataConfig, ModelConfig, MoEConfig, OptimizerConfig, TrainConfig
from gshardx.infer.load import load_run
from gshardx.models.build import Variables
from gshardx.models.items import items_of
from gshardx.sharding import MeshConfig
from gshardx.train import loop
from gshardx.train.evaluate import BITS_PER_BYTE, evaluate
from gshardx.train.job import Job
from gshardx.train.run_dir import RunDir
from gshardx.train.state import averaged
from gshardx.train.text import read_text
from tests.oracles import optimizers as oracle

OPTIMIZERS = {
    "adafactor": OptimizerConfig(name="adafactor", beta1=0.0, learning_rate=0.01),
    "lion": OptimizerConfig(name="lion", learning_rate=1e-3),
    "muon": OptimizerConfig(name="muon"),
}


@pytest.mark.parametrize("decay", [0.5, 0.99, 0.9999])
def test_the_average_is_that_of_a_loop_over_all_weights(decay):
    draw = np.random.default_rng(0)
    history = [draw.normal(size=(3, 4)).astype(np.float32) for _ in range(20)]
    ema, step = {"w": draw.normal(size=(3, 4)).astype(np.float32)}, jax.jit(averaged, static_argnums=2)
    for at, weights in enumerate(history):
        ema = step(ema, {"w": weights}, decay, jnp.asarray(at + 1, jnp.int32))
        np.testing.assert_allclose(ema["w"], oracle.average(decay, history[: at + 1]), rtol=1e-6, atol=1e-6)


def config(tmp_path, mesh, optimizer, steps, **train):
    """One line of text a step; the rate does not depend on how many steps are still to come."""
    text = tmp_path / "text.jsonl"
    text.write_text("".join(f'{{"text": "{word} {"to be or not to be " * 6}"}}\n' for word in "abcdefghij"))
    moe = MoEConfig(num_experts=4, hidden=16)
    changed = {"warmup_steps": 1, "schedule": "inverse_sqrt", "decay_start": 100}
    return Config(
        model=ModelConfig(layers=4, width=16, heads=2, kv_heads=1, head_dim=8, hidden=16, moe=moe),
        mesh=mesh,
        data=DataConfig(path=str(text), tokenizer="bytes", sequence_length=16),
        optimizer=dataclasses.replace(optimizer, **changed),
        train=TrainConfig(**({"steps": steps, "batch_size": 8, "sample_tokens": 0} | train)),
        checkpoint=CheckpointConfig(every=1, keep=10),
    )


def trained(tmp_path, name, chosen):
    """The run's directory and its lines, without times."""
    run = RunDir(tmp_path / name)
    assert loop.train(chosen, run, "command") == 0
    lines = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    return run, [{k: v for k, v in line.items() if not k.startswith(("perf", "goodput"))} for line in lines]


@pytest.mark.slow
@pytest.mark.parametrize("stage", [3, pytest.param(1, marks=pytest.mark.sweep)])
def test_what_is_saved_evaluated_and_served_is_the_average_of_all_steps(tmp_path, stage):
    chosen = config(tmp_path, MeshConfig(fsdp=2, expert=4), OptimizerConfig(ema_decay=0.7), 4, zero_stage=stage)
    run, lines = trained(tmp_path, "run", chosen)
    job = Job.of(dataclasses.replace(chosen, mesh=MeshConfig()), 257)

    def saved(step, item):
        return load(run.checkpoints, step, items_of(job.blueprint.variables, averaged=item == "ema"))[item]

    history = [jax.device_get(saved(step, "params")) for step in range(1, 5)]
    expected = jax.tree.map(lambda *leaves: oracle.average(0.7, leaves), *history)
    ema = saved(4, "ema")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6), ema, expected)

    text = read_text(chosen.data)
    bits = evaluate(job, Variables(ema, job.blueprint.init_router()), text)[BITS_PER_BYTE]
    assert lines[-1]["evaluation/bits_per_byte"] == pytest.approx(bits, rel=1e-5)
    last = evaluate(job, Variables(saved(4, "params"), job.blueprint.init_router()), text)[BITS_PER_BYTE]
    assert bits != pytest.approx(last, rel=1e-4)

    served = load_run(run.path, MeshConfig(expert=2)).variables.params
    jax.tree.map(np.testing.assert_array_equal, served, ema)


@pytest.mark.slow
def test_inference_needs_no_weights_but_the_averaged_ones(tmp_path):
    """A flipped bit in the last step's own weights does not matter to it; one in the average does."""
    chosen = config(tmp_path, MeshConfig(expert=4), OptimizerConfig(ema_decay=0.7), 2)
    run, _ = trained(tmp_path, "run", chosen)
    for item, expected in (("params", 2), ("ema", 1)):
        chunk = max((run.checkpoints / "2" / item).rglob("0"), key=lambda p: p.is_file() and p.stat().st_size)
        data = bytearray(chunk.read_bytes())
        data[len(data) // 2] ^= 16
        chunk.write_bytes(bytes(data))
        assert load_run(run.path, MeshConfig()).step == expected


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_what_an_optimizer_keeps_comes_back_on_another_mesh_value_by_value(tmp_path, name):
    """From real files; every value drawn, since zeros would hide what is swapped or lost."""
    optimizer, draw = dataclasses.replace(OPTIMIZERS[name], ema_decay=0.9), np.random.default_rng(0)
    meshes = MeshConfig(data=2, fsdp=2, expert=2), MeshConfig(fsdp=4, expert=2)
    before, after = (Job.of(config(tmp_path, mesh, optimizer, 1), 257).state for mesh in meshes)

    def drawn(a):
        values = draw.integers(0, 100, a.shape) if a.dtype == np.int32 else draw.normal(size=a.shape)
        return jax.device_put(values.astype(a.dtype), a.sharding)

    def items(state):
        return {"optimizer": state.opt_state, "ema": state.ema}

    saved = jax.tree.map(drawn, items(before))
    store = CheckpointStore(tmp_path / "checkpoints", 1, 2)
    store.save(1, saved)
    store.close()
    found = load(tmp_path / "checkpoints", 1, items(after))
    assert jax.tree.structure(found) == jax.tree.structure(items(after))
    jax.tree.map(np.testing.assert_array_equal, found, saved)
    assert jax.tree.all(jax.tree.map(lambda a, b: a.sharding == b.sharding, found, items(after)))


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow if n == "muon" else pytest.mark.sweep) for n in OPTIMIZERS]
)
def test_a_run_goes_on_from_its_files_on_another_mesh(tmp_path, name):
    optimizer = dataclasses.replace(OPTIMIZERS[name], ema_decay=0.9)
    before, after = MeshConfig(data=2, fsdp=2, expert=2), MeshConfig(fsdp=4, expert=2)
    _, straight = trained(tmp_path, "straight", config(tmp_path, before, optimizer, 5))
    trained(tmp_path, "moved", config(tmp_path, before, optimizer, 3))
    _, moved = trained(tmp_path, "moved", config(tmp_path, after, optimizer, 5, zero_stage=2))
    moved = [line for line in moved if line["step"] > 3]
    for mine, theirs in zip(moved, straight[3:], strict=True):
        for key in (
            "learning/loss",
            "learning/grad_norm",
            "learning/current_learning_rate",
            "evaluation/bits_per_byte",
        ):
            assert (key in mine) == (key in theirs)
            assert mine.get(key, 0.0) == pytest.approx(theirs.get(key, 0.0), rel=2e-5), key
    assert "evaluation/bits_per_byte" in moved[-1]


@pytest.mark.sweep
def test_a_resumed_run_ends_bit_for_bit_where_it_would_have(tmp_path):
    mesh, optimizer = MeshConfig(data=2, fsdp=2, expert=2), dataclasses.replace(OPTIMIZERS["muon"], ema_decay=0.9)
    _, straight = trained(tmp_path, "straight", config(tmp_path, mesh, optimizer, 4))
    trained(tmp_path, "resumed", config(tmp_path, mesh, optimizer, 2))
    _, resumed = trained(tmp_path, "resumed", config(tmp_path, mesh, optimizer, 4))
    assert [line for line in resumed if line["step"] > 2] == straight[2:]
