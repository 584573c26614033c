"""Memory by kind: everything adds up to what XLA allocated, and saved activations are found in the loops."""

import pytest

from gshardx.layers.remat import REMAT
from gshardx.plan.memory import KINDS, by_kind, saved_activations
from gshardx.plan.program import Inputs
from gshardx.plan.report import make_plan
from gshardx.plan.topology import open_topology, prepare
from gshardx.sharding import Memory, bytes_per_device
from gshardx.sharding.hlo import parse
from tests.plan.tiny import SERVING, config, planned

DEEP = 4
"""Layers: two units, so that the stack is a loop; a loop of one unit is none to XLA."""


@pytest.mark.parametrize("step", ["train", "forward", "prefill", "decode"])
def test_kinds_add_up_to_the_peak(step):
    plan, compiled = planned(step)
    assert set(plan.memory) == {*KINDS, "peak"}
    assert all(size >= 0 for size in plan.memory.values())
    assert sum(plan.memory[kind] for kind in KINDS) == plan.memory["peak"] == compiled.step.memory.peak
    read = compiled.inputs.bytes_per_device()
    assert {kind: plan.memory[kind] for kind in read} == read


def test_what_each_step_holds():
    train, forward, decode = (planned(step)[0].memory for step in ("train", "forward", "decode"))
    assert train["gradients"] == train["parameters"] == forward["parameters"] == decode["parameters"]
    assert train["optimizer"] == 2 * train["parameters"] + 8  # two moments, two counters
    assert (forward["gradients"], forward["optimizer"], forward["activations"], forward["kv_cache"]) == (0, 0, 0, 0)
    assert decode["kv_cache"] > 0


@pytest.mark.sweep
def test_rematerialisation_saves_activations():
    """On CPUs the host's memory is the device's: "offload" keeps as much as "keep_all_to_all"."""
    kept = {remat: planned(remat=remat, layers=DEEP)[0].memory["activations"] for remat in REMAT}
    assert 0 < kept["full"] < kept["offload"] == kept["keep_all_to_all"] < kept["dots"] < kept["none"]
    # Each unit's input: 32 tokens of a device, width 16, fp32.
    assert kept["full"] >= DEEP // 2 * 32 * 16 * 4


@pytest.mark.sweep
def test_on_tpus_offloading_takes_the_hosts_memory_and_sends_nothing_again():
    """A program this small lives in VMEM too, which only XLA's own peak counts."""
    pytest.importorskip("libtpu")
    prepare("v5e:2x4")
    peak, host, exchanges = {}, {}, {}
    for remat in ("none", "dots", "keep_all_to_all", "offload", "full"):
        sizes = {"layers": 16, "width": 256, "hidden": 512, "moe": {"hidden": 256}, "data": {"sequence_length": 256}}
        chosen = config(remat=remat, train={"batch_size": 32}, **sizes)
        step = make_plan(chosen, open_topology("v5e:2x4"), "train", SERVING)[1].step
        found = step.executable.memory_analysis()
        peak[remat], host[remat] = found.peak_memory_in_bytes, found.host_temp_size_in_bytes
        exchanges[remat] = sum(one.count for one in step.collectives if one.op == "all-to-all")
    assert peak["none"] > peak["dots"] > peak["keep_all_to_all"] > peak["offload"] > peak["full"]
    assert {remat for remat, size in host.items() if size} == {"offload"}
    assert exchanges["full"] == 6 * 8
    assert {exchanges[remat] for remat in ("none", "dots", "keep_all_to_all")} == {4 * 8}
    assert exchanges["offload"] <= 4 * 8 + 2  # XLA peels its first turn off the loop, for the copies to be ahead


LOOP = """HloModule m

%body (p: (s32[], f32[8,4], f32[3,4], f32[3,4])) -> (s32[], f32[8,4], f32[3,4], f32[3,4]) {
  %p = (s32[], f32[8,4], f32[3,4], f32[3,4]) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %x = f32[8,4] get-tuple-element(%p), index=1
  %saved = f32[3,4] get-tuple-element(%p), index=2
  %given = f32[3,4] get-tuple-element(%p), index=3
  %row = f32[1,4] dynamic-slice(%given, %i, %i), dynamic_slice_sizes={1,4}
  %stored = f32[3,4] dynamic-update-slice(%saved, %row, %i, %i)
  %copied = f32[3,4] copy(%given)
  ROOT %out = (s32[], f32[8,4], f32[3,4], f32[3,4]) tuple(%i, %x, %stored, %copied)
}

%condition (p.1: (s32[], f32[8,4], f32[3,4], f32[3,4])) -> pred[] {
  %p.1 = (s32[], f32[8,4], f32[3,4], f32[3,4]) parameter(0)
  ROOT %less = pred[] constant(true)
}

ENTRY %main (a: (s32[], f32[8,4], f32[3,4], f32[3,4])) -> (s32[], f32[8,4], f32[3,4], f32[3,4]) {
  %a = (s32[], f32[8,4], f32[3,4], f32[3,4]) parameter(0)
  ROOT %loop = (s32[], f32[8,4], f32[3,4], f32[3,4]) while(%a), condition=%condition, body=%body, AFTER
}
""".replace("AFTER", 'backend_config={"known_trip_count":{"n":"3"}}, metadata={op_name="NAME"}')


def test_only_what_the_forward_loop_stores_counts():
    """Three turns: of what has an axis of 3 one array is stored a slice a turn, the other is only handed on."""
    assert saved_activations(parse(LOOP.replace("NAME", "jit(step)/jvp()/while"))) == 3 * 4 * 4


def test_the_backward_loop_stores_no_activations():
    assert saved_activations(parse(LOOP.replace("NAME", "jit(step)/transpose(jvp())/while"))) == 0


def test_a_small_heap_is_never_shared_out_twice():
    """Where XLA's heap is smaller than the gradients would be, nothing becomes negative."""
    gradients = planned("forward")[1].inputs.parameters
    inputs = Inputs(parameters=(), gradients=gradients)
    memory = Memory(arguments=10, outputs=4, aliased=4, temporaries=100, program=7)
    kinds = by_kind(memory, parse(LOOP.replace("NAME", "jit(step)/jvp()/while")), inputs, "train")
    assert bytes_per_device(gradients) > 100
    assert (kinds["gradients"], kinds["activations"], kinds["temporaries"]) == (100, 0, 0)
    assert (kinds["inputs"], kinds["program"], kinds["peak"]) == (10, 7, 117)
