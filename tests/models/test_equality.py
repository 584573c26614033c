"""Layouts change no number: train step, prefill and decode on every mesh of eight devices are those of one device.

Each of them keeps to its budget there, so that what is run is what ``test_collectives`` would compile once more.
"""

import itertools
import json
from pathlib import Path

import jax
import numpy as np
import pytest

from gshardx.cli import run_command
from gshardx.config import OptimizerConfig, TrainConfig
from gshardx.models.budget import step_budget
from gshardx.models.build import Variables, blueprint
from gshardx.models.decode import Sampling
from gshardx.models.generator import Generator
from gshardx.sharding import MeshConfig, build_mesh, meeting, simulate_devices
from gshardx.sharding.distributed import fetch
from gshardx.train.optimizer import build_optimizer
from gshardx.train.state import abstract_state, init_state
from gshardx.train.step import TrainStep, abstract_batch, compile_train_step
from tests.models.conftest import INVOLUNTARY
from tests.models.test_decoder import LENGTH, ROWS, VOCAB, model, packed_batch
from tests.together import finish_both, start_both

CONFIG = model(router_options={"second_expert": "random"})
MESHES = [  # tensor divides the two key and value heads
    MeshConfig(*sizes)
    for sizes in itertools.product((1, 2, 4, 8), (1, 2, 4, 8), (1, 2, 4, 8), (1, 2))
    if np.prod(sizes) == 8
]
QUICK = (MeshConfig(expert=8), MeshConfig(data=2, expert=2, tensor=2))
PROMPT, STEPS, CHUNK = 6, 3, 4


def check_budget(plan, mesh, name, program, tokens):
    budget = step_budget(plan, mesh, name, rows=ROWS, tokens=tokens, split=plan.params)
    assert budget.breaches(program.collectives) == []


def trained(plan, params, mesh):
    """Losses and norms of three steps, and the parameters after them; takes ``params`` away.

    With Adam's usual epsilon the first update is lr * sign(g): rounding noise around 0 would be seen as lr.
    """
    optimizer = build_optimizer(OptimizerConfig(warmup_steps=1, epsilon=1e-2), 10, plan.axes)
    batch = abstract_batch(ROWS, LENGTH, mesh)
    update = TrainStep(plan, optimizer, TrainConfig())
    step = compile_train_step(update, abstract_state(plan, optimizer, mesh), batch, mesh)
    check_budget(plan, mesh, "train", step, LENGTH)
    state = init_state(plan, optimizer, 0, mesh, variables=Variables(params, plan.init_router()))
    found = {}
    for number in range(STEPS):
        state, metrics = jax.block_until_ready(step(state, packed_batch(batch)))
        found[f"step {number}"] = np.array(
            [fetch(metrics.loss), fetch(metrics.aux_losses["balance"]).mean(), fetch(metrics.grad_norm)], np.float32
        )
    for path, leaf in jax.tree_util.tree_leaves_with_path(state.params):
        found[jax.tree_util.keystr(path)] = fetch(leaf)
    return found


def decoded(plan, params, mesh):
    """Scores after the prompts, and after each of three more tokens."""
    variables = jax.block_until_ready(Variables(params, plan.init_router()))
    generator = Generator(plan, variables, mesh, length=LENGTH, rows=ROWS, chunk=CHUNK)
    check_budget(plan, mesh, "prefill", generator.prefill, CHUNK)
    check_budget(plan, mesh, "decode", generator.decode, 1)
    draw = np.random.default_rng(0)
    prompts = [draw.integers(0, VOCAB, PROMPT).astype(np.int32) for _ in range(ROWS)]
    state = generator._prefilled(prompts)
    found = {"prefill": fetch(state.logits)}
    put = generator._put
    whole, real = np.zeros(ROWS, np.int32), np.zeros(ROWS, np.float32)
    greedy = Sampling(put(real), put(whole), put(real + 1), put(whole.astype(np.uint32)))
    for number in range(STEPS):
        state, tokens = jax.block_until_ready(generator.decode(variables, state, greedy, put(np.ones(ROWS, bool))))
        found[f"decode {number}"], found[f"token {number}"] = fetch(state.logits), fetch(tokens)
    return found


def everything(mesh_config):
    mesh = build_mesh(mesh_config)
    plan = blueprint(CONFIG, VOCAB, mesh)
    params = jax.block_until_ready(plan.init(jax.random.key(0)))
    return decoded(plan, params, mesh) | trained(plan, params, mesh)


@pytest.fixture(scope="module")
def one_device():
    return everything(MeshConfig())


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, theirs in expected.items():
        np.testing.assert_allclose(found[name], theirs, rtol=1e-5, atol=1e-5, err_msg=name)


def test_there_are_enough_meshes():
    assert len(MESHES) == len(set(MESHES)) == 16
    assert all(mesh.size == 8 for mesh in MESHES)
    assert set(QUICK) < set(MESHES)


def tier(mesh_config):
    return pytest.mark.slow if mesh_config in QUICK else pytest.mark.sweep


@pytest.mark.parametrize("mesh_config", [pytest.param(m, marks=tier(m)) for m in MESHES], ids=str)
def test_every_mesh_gives_what_one_device_gives(mesh_config, one_device, compiling_anew, capfd):
    assert_same(everything(mesh_config), one_device)
    assert INVOLUNTARY not in capfd.readouterr().err


TOGETHER = [MeshConfig(data=2, fsdp=2, expert=2), MeshConfig(expert=8), MeshConfig(expert=4, tensor=2)]


@pytest.mark.parametrize(
    "mesh_config",
    [pytest.param(m, marks=pytest.mark.slow if m == TOGETHER[0] else pytest.mark.sweep) for m in TOGETHER],
    ids=str,
)
def test_two_processes_of_four_devices_give_what_one_device_gives(mesh_config, one_device, tmp_path):
    finish_both(start_both(tmp_path, str(Path(__file__)), json.dumps(mesh_config.shape)))
    with np.load(tmp_path / "found.npz") as found:
        assert_same(dict(found), one_device)


def in_one_of_two(argv):
    """Run in each process by the test above; process 0 writes found.npz."""
    where, (shape,) = meeting.take_flags(argv)
    with meeting.join(*where) as peers:
        simulate_devices(8, peers.count)
        found = everything(MeshConfig(**json.loads(shape)))
        assert (jax.process_count(), jax.local_device_count()) == (2, 4)
        if jax.process_index() == 0:
            np.savez("found.npz", **found)
    return 0


if __name__ == "__main__":
    run_command(in_one_of_two)
