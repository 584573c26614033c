"""Guard rails: planted NaNs, spikes and exploding routers, alone and in whole runs."""

import dataclasses
import json
import signal
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gshardx.config import (
    CheckpointConfig,
    DebugConfig,
    GuardConfig,
    OptimizerConfig,
)
from gshardx.data.prefetch import Ahead
from gshardx.errors import BadInput
from gshardx.sharding import MeshConfig
from gshardx.train import loop, saver
from gshardx.train.guard import Guard
from gshardx.train.job import Job
from gshardx.train.run_dir import RunDir


def metrics(loss=2.0, skipped=0, logits=(1.0, 1.0)):
    return SimpleNamespace(loss=loss, skipped=skipped, stats=SimpleNamespace(largest_logit=np.float32(logits)))


def watched(config, *seen, skipped=0):
    """A guard that has seen the steps from 1 on, and its lines."""
    lines = []
    guard = Guard(config, skipped, lines.append)
    for step, one in enumerate(seen, 1):
        guard.see(step, one)
    return guard, lines


SPIKES = GuardConfig(spike_factor=2.0, spike_window=3)


@pytest.mark.parametrize(
    ("losses", "step"),
    [
        ([2.0, 2.0, 2.0, 4.1], 4),
        ([2.0, 2.0, 2.0, 4.0, 2.0], 0),  # not above
        ([2.0, 2.0, 9.0], 0),  # too early to tell
        ([9.0, 2.0, 2.0, 2.0, 5.0], 5),  # the first loss has left the window
        ([2.0, 1.0, 9.0, 3.0, 7.0], 5),  # a median, not a mean
    ],
)
def test_a_spike_is_a_multiple_of_the_median(losses, step):
    guard, lines = watched(SPIKES, *map(metrics, losses))
    assert guard.spike == step
    assert bool(lines) == bool(step)
    if step:
        assert f"step {step}: loss {losses[-1]:.4g}" in lines[0]
        assert "guard.spike_factor = 2" in lines[0]


def test_without_a_factor_nothing_is_a_spike():
    assert watched(GuardConfig(spike_window=2), *map(metrics, [1.0, 1.0, 1e9]))[0].spike == 0


def test_skipped_steps_are_said_and_a_row_of_them_ends_the_run():
    config = GuardConfig(max_skipped=2)
    guard, lines = watched(config, metrics(skipped=5), metrics(skipped=6), metrics(skipped=6), skipped=4)
    assert (guard.skipped, len(lines)) == (6, 2)
    assert "step 2: gradients are not finite" in lines[1]
    assert "6 such step(s)" in lines[1]
    guard.see(4, metrics(skipped=7))
    guard.see(5, metrics(skipped=8))
    with pytest.raises(BadInput, match=r"3 steps in a row \(guard.max_skipped = 2\); lower optimizer.learning_rate"):
        guard.see(6, metrics(skipped=9))


def test_a_skipped_steps_loss_is_no_spike_and_no_measure():
    guard, _ = watched(SPIKES, *map(metrics, [2.0, 2.0, 2.0]), metrics(float("nan"), 1), metrics(5.0, 1))
    assert guard.spike == 5


def test_an_exploding_router_is_named_once_until_it_calms_down():
    loud, calm = metrics(logits=(1.0, 2000.0)), metrics(logits=(1.0, 400.0))
    _, lines = watched(GuardConfig(), loud, loud, metrics(logits=(1.0, 700.0)), loud, calm, loud)
    assert [line.split(":")[0] for line in lines] == ["step 1", "step 6"]
    assert "MoE layer 1 is 2000, above guard.router_logit = 1000; raise model.moe.losses.z" in lines[0]
    assert "not finite" in watched(GuardConfig(), metrics(logits=(float("nan"),)))[1][0]


@pytest.fixture
def config(config):
    return dataclasses.replace(
        config,
        optimizer=OptimizerConfig(learning_rate=0.03, warmup_steps=1, ema_decay=0.9),
        train=dataclasses.replace(config.train, steps=10),
        checkpoint=CheckpointConfig(every=2, keep=8),
    )


def planted(monkeypatch, change):
    """Every batch that a run takes goes through ``change``, with its number from 1 on."""
    taken, given = [0], Ahead.__next__

    def next_batch(self):
        taken[0] += 1
        return change(taken[0], given(self))

    monkeypatch.setattr(Ahead, "__next__", next_batch)


def run(config, folder):
    """Exit code, lines of metrics.jsonl, and the checkpointed arrays of the last step as bytes."""
    place = RunDir(folder)
    assert loop.train(config, place, "command") == 0
    lines = [json.loads(line) for line in place.metrics.read_text().splitlines()]
    saved = place.checkpoints / str(config.train.steps)
    return lines, {
        str(f.relative_to(saved)): f.read_bytes()
        for item in ("params", "ema")
        for f in (saved / item).rglob("*")
        if "success" not in f.name and f.is_file()
    }


def with_weights(batch, value):
    return batch._replace(weights=batch.weights * value)


@pytest.mark.slow
def test_a_planted_nan_changes_nothing_but_the_count(config, tmp_path, monkeypatch, capfd):
    states = []
    with monkeypatch.context() as patch:
        planted(patch, lambda number, batch: with_weights(batch, jnp.float32("nan")) if number == 4 else batch)
        items = saver.items_of
        patch.setattr(saver, "items_of", lambda state, rows: states.append(jax.device_get(state)) or items(state, rows))
        lines, _ = run(dataclasses.replace(config, checkpoint=CheckpointConfig(every=1)), tmp_path / "run")
    assert [line["guard/skipped_steps"] for line in lines] == [0.0] * 3 + [1.0] * 7
    assert lines[3]["learning/grad_norm"] is None
    before, after = states[2], states[3]
    assert (int(before.step), int(after.step), int(after.skipped)) == (3, 4, 1)
    for name in ("params", "opt_state", "router", "ema"):
        jax.tree.map(np.testing.assert_array_equal, getattr(before, name), getattr(after, name))
    changed = jax.tree.map(lambda a, b: bool((a != b).any()), states[1].params, states[2].params)
    assert all(jax.tree.leaves(changed)), "other steps change every parameter"
    assert "step 4: gradients are not finite, so it changed nothing; 1 such step(s) so far" in capfd.readouterr().out
    assert lines[4]["learning/current_learning_rate"] == lines[3]["learning/current_learning_rate"]


@pytest.mark.slow
def test_a_planted_spike_goes_back_and_leaves_the_batches_out(config, tmp_path, monkeypatch, capfd):
    """The rest is the run that never saw them: the one that takes batches 1 to 4, then 7 and later. A step that was
    skipped among those undone no longer counts, in the average neither."""
    guarded = dataclasses.replace(config, guard=GuardConfig(spike_factor=1.15, spike_window=2))
    with monkeypatch.context() as patch:
        planted(patch, lambda number, batch: SPOILED.get(number, lambda batch: batch)(batch))
        lines, spiked = run(guarded, tmp_path / "spiked")
    out = capfd.readouterr().out
    assert "step 6: loss" in out
    assert "back to step 4 without the 2 batches since (1 of 3 times)" in out
    assert [line["step"] for line in lines] == list(range(1, 11))
    assert [line["guard/rollbacks"] for line in lines] == [0.0] * 4 + [1.0] * 6
    with monkeypatch.context() as patch:
        without(patch, {5, 6})
        plain, calm = run(config, tmp_path / "plain")
    for name in ("learning/loss", "learning/current_learning_rate", "guard/skipped_steps"):
        assert [line[name] for line in lines] == [line[name] for line in plain], name
    assert spiked == calm
    assert (tmp_path / "spiked" / "damaged" / "6").is_dir()


def with_rare_targets(batch):
    return batch._replace(targets=jnp.full_like(batch.targets, 7))


SPOILED = {5: lambda batch: with_weights(batch, jnp.float32("nan")), 6: with_rare_targets}


def without(monkeypatch, numbers):
    taken, given = [0], Ahead.__next__

    def next_batch(self):
        while True:
            taken[0] += 1
            batch = given(self)
            if taken[0] not in numbers:
                return batch

    monkeypatch.setattr(Ahead, "__next__", next_batch)


@pytest.mark.slow
def test_a_run_that_spikes_too_often_ends(config, tmp_path, monkeypatch):
    guard = GuardConfig(spike_factor=1.15, spike_window=2, max_rollbacks=1)
    planted(monkeypatch, lambda number, batch: with_rare_targets(batch) if number in (6, 10) else batch)
    with pytest.raises(BadInput, match=r"has gone back 1 time\(s\) already"):
        loop.train(dataclasses.replace(config, guard=guard), RunDir(tmp_path / "run"), "command")


@pytest.mark.slow
def test_a_signal_in_the_step_that_spikes_saves_nothing_of_it(config, tmp_path, monkeypatch):
    def spoil(number, batch):
        if number == 6:
            signal.raise_signal(signal.SIGTERM)
            return with_rare_targets(batch)
        return batch

    planted(monkeypatch, spoil)
    guard, place = GuardConfig(spike_factor=1.15, spike_window=2), RunDir(tmp_path / "run")
    assert loop.train(dataclasses.replace(config, guard=guard), place, "command") == 128 + signal.SIGTERM
    assert max(int(step.name) for step in place.checkpoints.iterdir()) == 5, "back to 4, and a step of grace"
    assert (place.path / "damaged" / "6").is_dir()


@pytest.mark.slow
def test_an_exploding_router_is_named_in_a_run(config, tmp_path, monkeypatch, capfd):
    start = Job.init_state

    def exploded(self):
        state = start(self)
        router = state.params["stack"]["units"]["sparse"]["feed_forward"]["router"]
        router["kernel"] = router["kernel"] * 1e6
        return state

    monkeypatch.setattr(Job, "init_state", exploded)
    short = dataclasses.replace(config, train=dataclasses.replace(config.train, steps=2))
    run(short, tmp_path / "run")
    assert "step 1: the largest router logit of MoE layer 0 is" in capfd.readouterr().out


@pytest.mark.slow
def test_debug_nans_names_the_operation_and_the_line(config, tmp_path, monkeypatch):
    planted(monkeypatch, lambda number, batch: with_weights(batch, jnp.float32("inf")) if number == 2 else batch)
    debugged = dataclasses.replace(config, debug=DebugConfig(nans=True, dump_hlo=True), mesh=MeshConfig())
    with pytest.raises(BadInput, match=r"step 2: .*encountered in \w+.*, at gshardx/train/\w+.py:\d+ in"):
        loop.train(debugged, RunDir(tmp_path / "run"), "command")
    dumped = {file.name: file.read_text() for file in (tmp_path / "run" / "hlo").iterdir()}
    assert dumped.keys() == {f"{n}.{k}.txt" for n in ("train", "forward") for k in ("stablehlo", "optimized")}
    assert "stablehlo.dot_general" in dumped["train.stablehlo.txt"]
    assert "ENTRY" in dumped["train.optimized.txt"]
