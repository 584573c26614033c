"""A plan: stable JSON names, counts of parameters by hand, a verdict, and what the compiler complained of."""

import json
import math

import pytest

from gshardx.errors import BadInput
from gshardx.plan.memory import KINDS
from gshardx.plan.program import Serving, model_on
from gshardx.plan.report import complaints, count_parameters, example_mesh, make_plan, mesh_on, tokens_of
from gshardx.sharding import MeshConfig, build_mesh
from tests.plan.tiny import MESH, SERVING, config, planned, refused, topology

STABLE = {
    "fits": bool, "parameters": int, "active_parameters": int, "memory": dict, "flops_per_device": int,
    "collectives": list, "moe_layers": int, "lower_seconds": float, "compile_seconds": float, "hlo_instructions": int,
    "predicted_step_seconds": float, "tokens_per_second": float, "mfu_bound": float, "roofline": dict,
    "program_bytes": int, "hbm_bytes": int, "devices": int, "chips": int, "tokens": int, "mesh": dict,
}  # fmt: skip


@pytest.mark.parametrize("step", ["train", "forward", "prefill", "decode"])
def test_json_has_the_stable_names(step):
    facts = json.loads(json.dumps(planned(step)[0].as_json()))
    assert {name: type(facts[name]) for name in STABLE} == STABLE
    assert set(facts["memory"]) == {*KINDS, "peak"}
    assert all(type(size) is int for size in facts["memory"].values())
    for one in facts["collectives"]:
        assert {name: type(one[name]) for name in ("op", "axes", "count", "bytes_per_device")} == {
            "op": str, "axes": list, "count": int, "bytes_per_device": int,
        }  # fmt: skip
    assert facts["step"] == step
    assert facts["predicted_step_seconds"] == facts["roofline"]["device"] + facts["roofline"]["interconnect"]
    assert facts["tokens_per_second"] == pytest.approx(facts["tokens"] / facts["predicted_step_seconds"])
    assert 0 < facts["mfu_bound"] < 1


def test_collectives_of_the_json_are_added_up():
    plan = planned("train")[0]
    listed = plan.as_json()["collectives"]
    assert len({(one["op"], tuple(one["axes"])) for one in listed}) == len(listed) < len(plan.collectives)
    for amount in ("count", "bytes_per_device"):
        assert sum(one[amount] for one in listed) == sum(getattr(one, amount) for one in plan.collectives)
    exchanges = [one for one in listed if one["op"] == "all-to-all"]
    assert [(one["axes"], one["count"]) for one in exchanges] == [(("expert",), 4)]


def test_parameters_by_hand():
    """2 layers of width 16 with 2 heads of 8 each way, one with a gated network of 32, one with 8 such experts."""
    attention, network, norms = 4 * 16 * 16, 3 * 16 * 32, 2 * 16
    others = 2 * (attention + norms) + network + 16 * 8 + 16 + 2 * 257 * 16
    plan = model_on(config(), build_mesh(MESH))
    assert count_parameters(plan) == others + 8 * network
    assert count_parameters(plan, active=True) == others + 2 * network
    facts = planned("forward")[0]
    assert (facts.parameters, facts.active_parameters) == (others + 8 * network, others + 2 * network)
    assert facts.moe_layers == 1


def test_sparse_parameters_of_other_shapes():
    chosen = config(layers=4, moe={"every": 1, "top_k": 1, "shared_hidden": 16, "shared": "gated"}, activation="relu")
    plan = model_on(chosen, build_mesh(MESH))
    whole, active = count_parameters(plan), count_parameters(plan, active=True)
    assert whole - active == 7 * 4 * 2 * 16 * 32


def test_tokens_of_a_step():
    serving = Serving(rows=6, length=32, chunk=8)
    assert [tokens_of(config(), step, serving) for step in ("train", "forward", "prefill", "decode")] == [
        256,
        256,
        48,
        6,
    ]


def test_what_does_not_fit_says_so_and_keeps_its_facts():
    """A device with room for state and gradients but not for the whole step."""
    peak = planned("train")[0].memory["peak"]
    plan, _ = make_plan(config(), topology(hbm_bytes=peak - 1), "train", SERVING)
    assert not plan.fits
    assert plan.memory["peak"] == peak
    assert plan.hlo_instructions == planned("train")[0].hlo_instructions
    assert planned("train")[0].fits


def test_what_xla_refuses_keeps_what_is_known(monkeypatch):
    plan, known = refused(monkeypatch), planned("train")[1].inputs.bytes_per_device()
    assert not plan.fits
    assert plan.memory == dict.fromkeys(KINDS) | known | {"peak": 32 * 2**30}
    facts = json.loads(json.dumps(plan.as_json()))
    assert facts["fits"] is False
    assert facts["parameters"] == planned("train")[0].parameters
    for name in ("predicted_step_seconds", "collectives", "hlo_instructions", "roofline", "flops_per_device"):
        assert facts[name] is None


@pytest.mark.parametrize("mesh", [MeshConfig(data=4), MeshConfig(data=16), MeshConfig(expert=8, data=2)])
def test_a_mesh_unlike_the_devices_gets_a_line(mesh):
    with pytest.raises(BadInput) as error:
        mesh_on(config(mesh, train={"batch_size": 16}), topology())
    assert f"has {mesh.size} devices and topology cpu:8 has 8" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("devices", [1, 2, 6, 8, 24, 48, 2048])
def test_the_example_is_a_mesh_of_so_many_devices(devices):
    flags = example_mesh(config(), devices).split()
    axes = {name.removeprefix("--mesh."): int(size) for name, size in zip(flags[::2], flags[1::2], strict=True)}
    mesh = MeshConfig(**axes)
    assert mesh.size == math.prod(axes.values()) == devices
    config(mesh, train={"batch_size": mesh.batch_shards})  # raises where a dimension does not divide


def test_complaints_are_found_in_the_log():
    line = (
        "W0000 00:00:1.0 1 spmd_partitioner.cc:652] [SPMD] Involuntary full rematerialization. The compiler cannot go "
        "from sharding {devices=[4,2]} to {devices=[2,4]} efficiently for HLO operation %x"
    )
    assert complaints(f"I0000 nothing\n  {line}\nE0000 else\n") == (line,)
    assert complaints("I0000 nothing\n") == ()
    assert planned("train")[0].warnings == ()
