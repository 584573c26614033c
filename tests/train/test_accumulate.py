"""Loss and gradients do not depend on micro-batches, mesh or padding; auxiliary losses and router biases included."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gshardx.config import Config, ModelConfig, MoEConfig, TrainConfig
from gshardx.models.build import blueprint
from gshardx.sharding import MeshConfig, build_mesh
from gshardx.sharding.distributed import fetch
from gshardx.train.accumulate import cut, joined, rows_together
from gshardx.train.objective import Batch
from gshardx.train.optimizer import build_optimizer
from gshardx.train.state import abstract_state, init_state
from gshardx.train.step import TrainStep, abstract_batch

ROWS, LENGTH, VOCAB = 64, 8, 16
ONE = MeshConfig()
GROUPS = {"groups": 4, "groups_kept": 2}
CASES = {
    "gshard": {"router_options": {"second_expert": "random"}, "losses": {"balance": 0.3, "z": 0.1}},
    "sampling": {"router_options": {"second_expert": "sampling"}, "capacity_factor": 0.5},
    "switch": {"router": "switch", "top_k": 1, "router_options": {"jitter": 0.3}, "losses": {"balance": 0.3}},
    "sigmoid_bias": {"router": "sigmoid_bias", "losses": {"balance": 0.3, "z": 0.1}, "adaptive_balance": True},
    "noisy_top_k": {"router": "noisy_top_k", "losses": {"importance": 0.1, "load": 0.1}},
    "dynmoe": {"router": "dynmoe", "top_k": 4, "losses": {"balance": 0.3, "diversity": 0.1}},
    "adamoe": {"router": "adamoe", "top_k": 3, "router_options": {"null_experts": 4}},
    "cosine": {"router": "cosine", "router_options": {"projection": 4}},
    "skywork": {"router": "skywork"},
    "expert_choice": {"router": "expert_choice", "capacity_factor": 1.0},
    "capped": {
        "router": "expert_choice",
        "capacity_factor": 1.0,
        "router_options": {"most": 3, "smoothness": 0.1, "iterations": 20},
    },
    "hash": {"router": "hash"},
    "moe_pp": {"router": "moe_pp", "top_k": 3, "router_options": {"constant": 1}},
    "random priority": {"router": "top_k", "router_options": {"priority": "random"}, "capacity_factor": 0.5},
    "dropped tokens": {"router": "top_k", "router_options": {"token_drop": 0.3}},
    "rounded": {"router": "top_k", "router_options": {"round_to": 2}},
    "masked": {"router": "top_k", "router_options": {"output_masking": 0.3}},
    "base": {"router": "base", "top_k": 1},
    "sinkhorn": {"router": "sinkhorn"},
    "quantile": {"router": "quantile"},
    "dselect_k": {"router": "dselect_k", "losses": {"balance": 0.1, "selector_entropy": 0.1, "selector_reach": 0.1}},
    "ds_moe": {"router": "ds_moe", "losses": {"balance": 0.1, "mutual_information": 0.5}},
    "smoe_dropout": {"router": "smoe_dropout", "top_k": 3, "router_options": {"fewest": 2}},
    "relu": {
        "router": "relu",
        "router_options": {"most": 4, "start": 0.1},
        "losses": {"balance": 0.1, "sparsity": 1.0},
    },
    "sentence": {"router": "sentence"},
    "task": {"router": "task", "router_options": {"tags": [1, 2, 3]}},
    "demix": {"router": "demix", "top_k": 1, "router_options": {"tags": list(range(1, 9))}},
    "sparse_mixer": {"router": "sparse_mixer", "router_options": {"jitter": 0.3, "input_jitter": 0.1}},
    "soft_moe": {"router": "soft_moe", "router_options": {"slots": 2}},
    "stable": {"router": "stable", "top_k": 1, "losses": {"balance": 0.3, "distillation": 0.3}},
    "smear": {"router": "smear", "top_k": 1, "router_options": {"expert_dropout": 0.3}},
    "lory": {"router": "lory", "top_k": 1, "router_options": {"segment": 2}},
    "meo": {"router": "meo", "losses": {"balance": 0.3, "importance": 0.1, "load": 0.1}},
    "ragged": {"router": "top_k", "dispatcher": "ragged", "capacity_factor": None},
    **{
        name: {"router": "top_k", "router_options": GROUPS, "losses": {"balance": 0.1, name: 0.5}}
        for name in ("first_choice", "all_choices", "batch", "device", "communication", "importance")
    },
}
"""A case for each balance loss and each router; those with weights on losses over the batch need two passes."""
MESHES = [MeshConfig(expert=8), MeshConfig(data=2, fsdp=2, expert=2), MeshConfig(expert=2, tensor=2, fsdp=2)]

MORE_MESHES = [MeshConfig(data=8), MeshConfig(fsdp=4, tensor=2), MeshConfig(data=4, expert=2)]

FIRST = {"gshard", "sigmoid_bias", "communication"}
"""Cases that are no sweep."""


def model(case, group_size=None, dropout=0.0):
    moe = {"num_experts": 8, "hidden": 8, "every": 1, "group_size": group_size, **CASES[case]}
    sizes = {"layers": 2, "width": 8, "heads": 2, "kv_heads": 2, "head_dim": 4, "hidden": 8}
    return ModelConfig(**sizes, dropout=dropout, moe=MoEConfig(**moe))


def rows_of(kind, seed=0):
    """``padded``: one document a row, of any length, none included; ``packed``: three documents fill a row."""
    draw = np.random.default_rng(seed)
    tokens, targets = draw.integers(0, VOCAB, (2, ROWS, LENGTH), dtype=np.int32)
    if kind == "padded":
        length = draw.integers(0, LENGTH + 1, (ROWS, 1))
        length[: ROWS // 4] = draw.integers(0, 2, (ROWS // 4, 1))  # micro-batches of very different sizes
        segments = (np.arange(LENGTH) < length).astype(np.int32)
        positions = np.where(segments, np.arange(LENGTH), 0).astype(np.int32)
    else:
        segments = np.tile(np.array([1, 1, 1, 2, 2, 2, 2, 3], np.int32), (ROWS, 1))
        positions = np.tile(np.array([0, 1, 2, 0, 1, 2, 3, 0], np.int32), (ROWS, 1))
    weights = (segments > 0) * draw.integers(0, 2, segments.shape).astype(np.float32)
    return Batch(tokens, targets, segments, positions, weights)


@functools.cache
def start(case, group_size, dropout):
    """A state on one device; a start on a mesh is a program of its own, and not what is tried here."""
    plan = blueprint(model(case, group_size, dropout), VOCAB, build_mesh(ONE))
    return init_state(plan, build_optimizer(Config().optimizer, 10, plan.axes), 0, build_mesh(ONE))


@functools.cache
def gradient_of(case, mesh_config, steps, group_size, dropout):
    """A function from rows to everything that a step's gradient pass gives: one program for rows of each kind."""
    mesh = build_mesh(mesh_config)
    plan = blueprint(model(case, group_size, dropout), VOCAB, mesh)
    config = TrainConfig(accumulation_steps=steps, label_smoothing=0.1, z_loss=0.01, trace_every=1)
    optimizer = build_optimizer(Config().optimizer, 10, plan.axes)
    places = abstract_state(plan, optimizer, mesh), abstract_batch(ROWS, LENGTH, mesh)
    step = TrainStep(plan, optimizer, config)

    @jax.jit
    def everything(state, batch):
        gradient, outcome = step.gradient(state, batch)
        stack = plan.bind(state.params).stack
        return gradient, outcome.tokens, stack.loss_values(outcome.losses), outcome

    def run(rows):
        given = jax.device_get(start(case, group_size, dropout)), rows
        with jax.set_mesh(mesh):
            put = jax.tree.map(lambda x, a: jax.device_put(x, a.sharding), given, places)
            return jax.block_until_ready(everything(*put))

    return run


@functools.cache
def found(case, mesh_config, steps, kind, group_size=None, dropout=0.0):
    """Everything that a step's gradient pass gives, on the host, by name."""
    leaves = jax.tree_util.tree_leaves_with_path(
        gradient_of(case, mesh_config, steps, group_size, dropout)(rows_of(kind))
    )
    return {jax.tree_util.keystr(path): fetch(leaf) for path, leaf in leaves}


def assert_same(actual, expected):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        size = np.abs(value).max(initial=0)
        np.testing.assert_allclose(actual[name], value, rtol=1e-5, atol=1e-5 * max(size, 1e-2), err_msg=name)


@pytest.mark.parametrize(
    "case", ["batch", *(pytest.param(c, marks=pytest.mark.slow) for c in ("gshard", "sigmoid_bias"))]
)
def test_two_micro_batches_are_one_batch(case):
    assert_same(found(case, ONE, 2, "padded"), found(case, ONE, 1, "padded"))


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=pytest.mark.slow if case in FIRST else pytest.mark.sweep) for case in CASES]
)
def test_micro_batches_on_a_mesh_are_one_batch_on_one_device(case):
    for kind in ("padded", "packed"):
        assert_same(found(case, MESHES[0], 8, kind), found(case, ONE, 1, kind))


@pytest.mark.slow
def test_dropout_does_not_depend_on_the_layout():
    dropped = found("gshard", ONE, 1, "packed", None, 0.3)
    assert_same(found("gshard", MESHES[1], 2, "packed", None, 0.3), dropped)
    kept = found("gshard", ONE, 1, "packed")
    assert any(np.abs(dropped[name] - kept[name]).max() > 1e-3 for name in kept)


@pytest.mark.sweep
@pytest.mark.parametrize("group_size", [4, 16])
def test_groups_stay_whole_in_micro_batches(group_size):
    expected = found("gshard", ONE, 1, "padded", group_size)
    assert_same(found("gshard", MESHES[1], 2, "padded", group_size), expected)


@pytest.mark.sweep
@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    case=st.sampled_from(list(CASES)),
    mesh=st.sampled_from([ONE, *MESHES, *MORE_MESHES]),
    steps=st.sampled_from([1, 2, 8]),
    kind=st.sampled_from(["padded", "packed"]),
    group_size=st.sampled_from([None, 4]),
)
def test_no_layout_changes_loss_or_gradient(case, mesh, steps, kind, group_size):
    assert_same(found(case, mesh, steps, kind, group_size), found(case, ONE, 1, kind, group_size))


def test_what_a_naive_mean_of_micro_batches_would_give_is_far_off():
    """The check can fail: micro-batches differ in their real tokens."""
    batch = rows_of("padded")
    sizes = [float(cut(jnp.asarray(batch.weights), 8, 1)[i].sum()) for i in range(8)]
    assert max(sizes) > 1.2 * min(sizes)


@pytest.mark.parametrize(("steps", "together"), itertools.product([1, 2, 4], [1, 2]))
def test_joined_undoes_cut(steps, together):
    rows = jnp.arange(16 * 3).reshape(16, 3)
    pieces = cut(rows, steps, together)
    assert pieces.shape == (steps, 16 // steps, 3)
    np.testing.assert_array_equal(joined(pieces, together), rows)
    blocks = np.asarray(pieces).reshape(-1, together, 3)
    assert all((np.diff(block[:, 0]) == 3).all() for block in blocks)  # neighbours stay neighbours


def test_rows_that_share_a_group():
    assert [rows_together(8, s) for s in (None, 8, 4, 16, 12)] == [1, 1, 1, 2, 3]
