"""The optimizers' formulas against abstract states and compiled steps."""

import dataclasses

import pytest

from gshardx.config import OptimizerConfig
from gshardx.plan import update
from gshardx.plan.estimate import estimate
from gshardx.plan.program import _inputs, model_on
from gshardx.plan.report import make_plan
from gshardx.sharding import MeshConfig, build_mesh
from tests.plan.test_estimate import medium
from tests.plan.tiny import CHIP, MESH, SERVING, topology

OPTIMIZERS = {
    "adamw": OptimizerConfig(ema_decay=0.99),
    "adafactor": OptimizerConfig(name="adafactor", beta1=0.0),
    "adafactor, momentum": OptimizerConfig(name="adafactor"),
    "lion": OptimizerConfig(name="lion"),
    "muon": OptimizerConfig(name="muon", ema_decay=0.99),
}
COUNTERS = {"adafactor, momentum": 12, "muon": 12}
"""Bytes of counters of steps, which the formulas leave out: one of each part that counts, and the schedule's."""


def using(name, mesh, **changed):
    return dataclasses.replace(medium(mesh, **changed), optimizer=OPTIMIZERS[name])


KINDS = {
    "plain": {},
    "gated": {"moe": {"every": 1, "shared_hidden": 64, "shared": "gated"}},
    "residual, tied": {"moe": {"shared_hidden": 64, "shared": "residual", "biases": True}, "tie_embeddings": True},
}
CASES = [
    pytest.param(
        name, mesh, stage, kind, marks=[] if (mesh, stage, kind) == (MESH, 3, "residual, tied") else pytest.mark.sweep
    )
    for name in OPTIMIZERS
    for mesh in (MESH, MeshConfig(fsdp=2, expert=2, tensor=2))
    for stage in (1, 3)
    for kind in KINDS
]


@pytest.mark.parametrize(("name", "mesh", "stage", "kind"), CASES, ids=str)
def test_state_is_exact_for_every_optimizer_and_kind_of_model(name, mesh, stage, kind):
    chosen = using(name, mesh, **KINDS[kind], train={"zero_stage": stage})
    place = build_mesh(mesh)
    inputs = _inputs(chosen, model_on(chosen, place), place, "train", SERVING)
    assert estimate(chosen, topology()).optimizer == inputs.bytes_per_device()["optimizer"] - COUNTERS.get(name, 8)


@pytest.mark.parametrize(
    "mesh",
    [
        MeshConfig(fsdp=2, expert=4),
        pytest.param(MeshConfig(fsdp=8), marks=pytest.mark.sweep),  # 2 layers, and 8 experts that divide
        pytest.param(MeshConfig(fsdp=2, expert=2, tensor=2), marks=pytest.mark.sweep),
    ],
    ids=str,
)
@pytest.mark.slow
def test_muon_s_products_and_collectives_are_those_of_the_compiled_step(mesh):
    chosen = using("muon", mesh)
    plan, _ = make_plan(chosen, topology(), "train", SERVING)
    found = estimate(chosen, topology())
    assert update.flops(chosen) > 0.05 * plan.flops_per_device
    assert found.compute * CHIP.peak_flops == pytest.approx(plan.flops_per_device, rel=0.02)
    assert found.peak == pytest.approx(plan.memory["peak"], rel=0.25)
    assert found.interconnect == pytest.approx(plan.roofline.interconnect, rel=0.4)
    assert found.optimizer == plan.memory["optimizer"] - COUNTERS["muon"]


def test_what_muon_sends_by_hand():
    """Two layers in each of two units: the 2 x 2 dense matrices of 64 x 128 on fsdp=2, and so on."""
    chosen = using("muon", MeshConfig(fsdp=2, expert=4))
    sent = list(update.sends(chosen))
    assert {(op, axis) for op, axis, *_ in sent} == {("all-to-all", "fsdp")}
    experts = 3 * 2 * 2 * 32 * 128  # up, gate, down; units; experts here; half the width; hidden
    assert (("all-to-all", "fsdp", 6, 2 * experts)) in sent
    assert list(update.sends(using("adamw", MeshConfig(fsdp=2, expert=4)))) == []
