"""The decoder's budget by hand-computed figures, and the page that shows it."""

import math
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import jax
import pytest

from gshardx.models.budget import step_budget
from gshardx.models.build import blueprint
from gshardx.plan.topology import open_topology, prepare
from gshardx.sharding import MeshConfig, build_mesh
from gshardx.train.job import Job
from gshardx.train.state import whole_over_fsdp
from tests.children import environment
from tests.models.test_decoder import LENGTH, ROWS, VOCAB, model
from tests.plan.tiny import config

ROOT = Path(__file__).parent.parent.parent
DOC = (ROOT / "docs" / "collectives.md").read_text()
WIDTH, EXPERTS, MOE_LAYERS = 16, 8, 2


def budget(step, mesh_config, tokens=LENGTH, split=False, micro=1, **options):
    mesh = build_mesh(mesh_config)
    plan = blueprint(model(**options), VOCAB, mesh)
    moments = plan.params
    if split:
        plan = plan.__class__(**{**vars(plan), "params": whole_over_fsdp(plan.params)})
    return step_budget(plan, mesh, step, rows=ROWS, tokens=tokens, split=moments if split else None, micro=micro)


def allowance(found, op, *axes):
    (one,) = [each for each in found.allowances if (each.op, each.axes) == (op, axes)]
    return one


@pytest.mark.parametrize(
    ("step", "tokens", "count", "slots"),
    [("train", 16, 4, 5), ("forward", 16, 2, 16), ("prefill", 8, 2, 8), ("decode", 1, 2, 1)],
)
def test_exchanges_are_exact(step, tokens, count, slots):
    """ceil(1.25 * 2 * 16 / 8) = 5 slots in training; elsewhere as many as tokens. A device has 1 of 8 rows, or 2."""
    for mesh, rows in ((MeshConfig(expert=8), 1), (MeshConfig(data=2, expert=2, tensor=2), 2)):
        one = allowance(budget(step, mesh, tokens), "all-to-all", "expert")
        assert one.count == one.least == MOE_LAYERS * count
        assert one.bytes_per_device == one.least_bytes == MOE_LAYERS * count * rows * EXPERTS * slots * WIDTH * 4


def test_the_wire_is_what_travels():
    full, half = (
        allowance(budget("train", MeshConfig(expert=8), wire=wire), "all-to-all", "expert").bytes_per_device
        for wire in ("same", "bfloat16")
    )
    assert full == 2 * half


def test_shorter_groups_have_slots_of_their_own():
    """Two groups of 8 tokens a row, each with ceil(1.25 * 2 * 8 / 8) = 3 slots."""
    one = allowance(budget("train", MeshConfig(expert=8), group_size=8), "all-to-all", "expert")
    assert one.bytes_per_device == MOE_LAYERS * 4 * 2 * EXPERTS * 3 * WIDTH * 4


def test_without_an_expert_axis_nothing_is_exchanged():
    assert all("expert" not in one.axes for one in budget("train", MeshConfig(data=4, fsdp=2)).allowances)


@pytest.mark.parametrize(
    ("router", "loss", "first_pass"), [("noisy_top_k", "load", True), ("top_k", "z", False)], ids=["load", "z"]
)
def test_losses_over_the_batch_take_a_first_pass_over_the_micro_batches(router, loss, first_pass):
    """One forward pass more: half again of the exchanges of a forward and a backward pass."""
    mesh = MeshConfig(expert=2)
    without, found = (
        allowance(budget("train", mesh, micro=2, losses=losses, router=router), "all-to-all", "expert").count
        for losses in ({}, {loss: 0.1})
    )
    assert found == without * (1.5 if first_pass else 1)


def test_one_device_sends_nothing():
    assert budget("decode", MeshConfig()).allowances == ()
    assert budget("prefill", MeshConfig()).small == 0


def parameter_bytes(mesh_config, *, on_fsdp):
    mesh = build_mesh(mesh_config)
    params = jax.tree.leaves(blueprint(model(), VOCAB, mesh).params)
    return sum(
        math.prod(p.sharding.shard_shape(p.shape)) * 4
        for p in params
        if ("fsdp" in jax.tree.leaves(tuple(p.sharding.spec))) == on_fsdp
    )


def test_parameters_are_gathered_once_forward_and_twice_in_training():
    mesh = MeshConfig(fsdp=2, expert=2, tensor=2)
    once = parameter_bytes(mesh, on_fsdp=True)
    assert allowance(budget("forward", mesh), "all-gather", "fsdp").bytes_per_device == once > 0
    assert allowance(budget("train", mesh), "all-gather", "fsdp").bytes_per_device == 2 * once


def test_zero_stages_1_and_2_gather_what_the_optimizer_updated():
    mesh = MeshConfig(fsdp=4, expert=2)
    once = parameter_bytes(mesh, on_fsdp=True)
    assert allowance(budget("train", mesh, split=True), "all-gather", "fsdp").bytes_per_device == once
    assert allowance(budget("forward", mesh, split=True), "all-gather", "fsdp").bytes_per_device == 0


def test_gradients_of_experts_are_not_reduced_over_expert():
    """Over data all parameters' are; over expert all but the experts' [2, 8, 16, 8] x 3, a half on each device."""
    reduced = budget("train", MeshConfig(data=4, expert=2)).reduced
    assert reduced["data"] - reduced["expert"] == 3 * MOE_LAYERS * EXPERTS * WIDTH * 8 * 4 // 2


def test_gradients_cross_fsdp_whole():
    mesh = MeshConfig(fsdp=4, expert=2)
    found = budget("train", mesh)
    split, rest = (parameter_bytes(mesh, on_fsdp=on_fsdp) for on_fsdp in (True, False))
    assert found.reduced["fsdp"] - found.small == 4 * split + rest


def test_only_training_reduces_gradients():
    mesh = MeshConfig(data=4, expert=2)
    assert list(budget("train", mesh).reduced) == ["data", "expert"]
    assert [budget(step, mesh, 1).reduced for step in ("forward", "prefill", "decode")] == [{}, {}, {}]


def test_inference_gathers_its_logits_over_tensor_once():
    one = allowance(budget("decode", MeshConfig(data=4, tensor=2), 1), "all-gather", "tensor")
    assert (one.count, one.bytes_per_device) == (1, ROWS // 4 * VOCAB // 2 * 4)


# docs/collectives.md.


def rows_of(page):
    """Mesh and the rest of each row, by step; an empty mesh is the one above it."""
    found, step, mesh = {}, "", ""
    for line in page.splitlines():
        if line.startswith("### "):
            step = line.removeprefix("### ")
        elif line.startswith("| ") and not line.startswith("| mesh"):
            first, *rest = [cell.strip() for cell in line.strip("|").split("|")]
            mesh = first or mesh
            found.setdefault((step, mesh), []).append(rest)
    return found


@pytest.mark.parametrize(
    ("steps", "meshes"),
    [
        (["forward", "decode"], ["data=2,expert=4"]),
        pytest.param(
            ["train", "forward", "prefill", "decode"], ["fsdp=2,expert=2,tensor=2", "data=8"], marks=pytest.mark.sweep
        ),
    ],
)
def test_the_page_agrees_with_the_script(steps, meshes):
    command = [sys.executable, ROOT / "benchmarks" / "collectives.py", "--step", *steps, "--mesh", *meshes]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    printed, shown = rows_of(done.stdout), rows_of(DOC)
    assert len(printed) == len(steps) * len(meshes)
    assert printed == {key: shown[key] for key in printed}


def test_the_page_shows_every_mesh():
    shown = rows_of(DOC)
    assert {step for step, _ in shown} == {"train", "forward", "prefill", "decode"}
    assert len(shown) == 4 * 16


def test_the_example_of_the_page_runs(tmp_path):
    (program,) = re.findall(r"```python\n(.*?)```", DOC, re.DOTALL)
    (tmp_path / "program.py").write_text(program)
    for changed, broken in (("", False), ("least=2", True)):
        text = program.replace("count=2", "count=1") if changed else program
        done = subprocess.run(
            [sys.executable, "-c", text], env=environment(), capture_output=True, text=True, timeout=120
        )
        assert (done.returncode != 0) == broken, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mesh_config", "moe"),
    [
        (MeshConfig(fsdp=2, expert=4), {}),
        pytest.param(MeshConfig(data=2, expert=2, tensor=2), {}, marks=pytest.mark.sweep),
        (MeshConfig(expert=8), {"dispatcher": "ragged", "capacity_factor": None}),
    ],
    ids=str,
)
def test_a_train_step_on_tpus_keeps_to_it(mesh_config, moe):
    """Compiled for chips that are not here: reductions come as reduce-scatters, rows travel ragged."""
    pytest.importorskip("libtpu")
    if moe and version("libtpu").split(".") < ["0", "0", "50"]:
        pytest.skip("libtpu 0.0.42 fails inside on ragged_all_to_all (RET_CHECK in mask_aggregator.cc)")
    prepare("v5e:2x4")
    chosen = config(mesh_config, width=32, moe=moe, data={"tokenizer": "bpe", "vocab_size": 512})
    job = Job.of(chosen, 512, build_mesh(mesh_config, open_topology("v5e:2x4").devices))
    found = job.train_step.collectives
    sizes = {"rows": chosen.train.batch_size, "tokens": chosen.data.sequence_length}
    assert step_budget(job.blueprint, job.mesh, "train", **sizes).breaches(found) == []
    assert bool([one for one in found if one.op == "reduce-scatter"]) == (mesh_config.fsdp > 1)
