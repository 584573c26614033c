"""ZeRO (arXiv 1910.02054): what mesh.fsdp splits at each stage, to the byte, and that no stage changes a number."""

import functools
import math
import re

import jax
import numpy as np
import optax
import pytest

from gshardx.config import Config, DataConfig, OptimizerConfig, TrainConfig
from gshardx.sharding import MeshConfig
from gshardx.train.job import Job
from gshardx.train.state import abstract_state
from gshardx.train.step import TrainStep, compile_train_step
from tests.models.test_decoder import LENGTH, ROWS, VOCAB, model, packed_batch

FSDP = MeshConfig(fsdp=8)
MIXED = MeshConfig(data=2, fsdp=2, expert=2)
CASES = [
    pytest.param(2, FSDP),
    *(pytest.param(stage, FSDP, marks=pytest.mark.slow) for stage in (1, 3)),
    *(pytest.param(stage, MIXED, marks=pytest.mark.sweep) for stage in (1, 2, 3)),
]


def job(stage, mesh):
    # With Adam's usual epsilon the first update is lr * sign(g): rounding noise around 0 would be seen as lr.
    return Job.of(
        Config(
            model=model(layers=2),
            mesh=mesh,
            data=DataConfig(sequence_length=LENGTH),
            optimizer=OptimizerConfig(warmup_steps=1, epsilon=1e-2),
            train=TrainConfig(batch_size=ROWS, zero_stage=stage),
        ),
        VOCAB,
    )


@functools.cache
def trained(stage, mesh):
    """A job, its state after three steps, and what each step's line would say."""
    work = job(stage, mesh)
    state, lines = work.init_state(), []
    for _ in range(3):
        state, metrics = jax.block_until_ready(work.train_step(state, packed_batch(work.batch)))
        lines.append((float(metrics.loss), float(metrics.grad_norm)))
    return work, state, lines


def bytes_on_each_device(tree):
    """Bytes of addressable shards by device; every device must hold the same."""
    held = {}
    for array in jax.tree.leaves(tree):
        for shard in array.addressable_shards:
            held[shard.device] = held.get(shard.device, 0) + shard.data.nbytes
    assert len(set(held.values())) == 1
    return next(iter(held.values()))


def expected_bytes(work, split_over):
    """Of the parameters, each divided by the mesh axes of ``split_over`` that its logical axes live on."""
    sizes = work.config.mesh.shape
    over = {"embed": sizes["fsdp"] if "fsdp" in split_over else 1, "expert": sizes["expert"]}
    names = jax.tree.leaves(work.blueprint.axes, is_leaf=lambda x: isinstance(x, tuple))
    params = jax.tree.leaves(work.blueprint.params)
    return sum(
        4 * math.prod(p.shape) // math.prod(over.get(n, 1) for n in axes) for p, axes in zip(params, names, strict=True)
    )


def moments(state):
    (adam,) = [s for s in jax.tree.leaves(state.opt_state, is_leaf=is_adam) if is_adam(s)]
    return adam.mu, adam.nu


def is_adam(node):
    return isinstance(node, optax.ScaleByAdamState)


@pytest.mark.parametrize(("stage", "mesh"), CASES, ids=str)
def test_each_device_holds_its_share_to_the_byte(stage, mesh):
    work, state, _ = trained(stage, mesh)
    split, whole = expected_bytes(work, {"fsdp"}), expected_bytes(work, set())
    assert bytes_on_each_device(state.params) == (split if stage == 3 else whole)
    for moment in moments(state):
        assert bytes_on_each_device(moment) == split
    assert split < whole / mesh.fsdp * 1.1  # all but the norms


@pytest.mark.parametrize(("stage", "mesh"), CASES, ids=str)
def test_no_stage_changes_a_number(stage, mesh):
    _, state, lines = trained(stage, mesh)
    _, alone, expected_lines = trained(3, MeshConfig())
    np.testing.assert_allclose(lines, expected_lines, rtol=1e-5)
    for mine, theirs in zip(jax.tree.leaves(state.params), jax.tree.leaves(alone.params), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-6)


def instructions(step, op):
    """Lines of the optimised HLO."""
    return [line for line in step.hlo.splitlines() if re.search(rf" {op}(-start)?\(", line)]


@pytest.mark.parametrize(("stage", "mesh"), CASES[:3], ids=str)
def test_parameters_are_gathered_where_their_stage_says(stage, mesh):
    """Stage 3 gathers a parameter where a layer reads it; stages 1 and 2 gather each updated parameter once, after the
    last gradient.

    Gradients are summed by all-reduce at every stage, of which each device keeps its slice: XLA's CPU compiler has no
    pass that makes one reduce-scatter of the two, and the moments' places already make the partitioner slice at stage
    1, so that the constraint of stage 2 adds a guarantee and no exchange.
    """
    work, _, _ = trained(stage, mesh)
    gathers = instructions(work.train_step, "all-gather")
    split = [p for p in jax.tree.leaves(work.split) if "fsdp" in str(p.sharding.spec)]
    in_layers = [line for line in gathers if "while/body" in line]
    if stage == 3:
        assert len(in_layers) > len(split)
    else:
        assert not in_layers
        assert len(gathers) == len(split)
    assert not instructions(work.train_step, "reduce-scatter")
    assert instructions(work.train_step, "all-reduce")


@pytest.mark.slow
def test_stage_2_reduces_gradients_into_their_slices():
    """The moments' places say the same as the constraint; with moments whole, the constraint alone must do it."""
    work = job(2, FSDP)
    shardings = jax.tree.map(lambda a: a.sharding, work.split)
    lowered = {}
    for places in (None, shardings):
        update = TrainStep(work.blueprint, work.optimizer, work.config.train, places)
        state = abstract_state(work.blueprint, work.optimizer, work.mesh)
        step = compile_train_step(update, state, work.batch, work.mesh)
        lowered[places is not None] = len(instructions(step, "all-gather"))
    assert lowered[False] == 0
    assert lowered[True] >= len([p for p in jax.tree.leaves(work.split) if "fsdp" in str(p.sharding.spec)])
