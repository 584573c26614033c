"""The roofline: parts that add up, instructions bound by the slower of two, collectives on the network they cross."""

import dataclasses
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from gshardx.plan import network
from gshardx.plan.roofline import collective_seconds, roofline, slices_of
from gshardx.sharding import Collective, build_mesh
from gshardx.sharding.cost import matmul_flops, memory_traffic
from gshardx.sharding.hlo import parse
from tests.plan.tiny import CHIP, MESH, planned, topology

AXES = ("data", "fsdp", "expert", "tensor")

# A product of 8 x 4 x 16 inside a loop of 5 turns, and an addition: 5 * 1024 FLOPs.
PROGRAM = """HloModule m

%body (p: (s32[], f32[8,4], f32[4,16])) -> (s32[], f32[8,4], f32[4,16]) {
  %p = (s32[], f32[8,4], f32[4,16]) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %x = f32[8,4] get-tuple-element(%p), index=1
  %w = f32[4,16] get-tuple-element(%p), index=2
  %dot = f32[8,16] dot(%x, %w), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT %out = (s32[], f32[8,4], f32[4,16]) tuple(%i, %x, %w)
}

%condition (p.1: (s32[], f32[8,4], f32[4,16])) -> pred[] {
  %p.1 = (s32[], f32[8,4], f32[4,16]) parameter(0)
  ROOT %less = pred[] constant(true)
}

ENTRY %main (a: (s32[], f32[8,4], f32[4,16]), b: f32[100]) -> f32[100] {
  %a = (s32[], f32[8,4], f32[4,16]) parameter(0)
  %b = f32[100] parameter(1)
  %loop = (s32[], f32[8,4], f32[4,16]) while(%a), condition=%condition, body=%body, AFTER
  ROOT %sum = f32[100] add(%b, %b)
}
""".replace("AFTER", 'backend_config={"known_trip_count":{"n":"5"}}')
FLOPS, PRODUCT_BYTES, SUM_BYTES = 2 * 8 * 4 * 16, 4 * (8 * 4 + 4 * 16 + 8 * 16), 4 * 300


def test_a_program_by_hand():
    mesh = build_mesh(MESH)
    chip = dataclasses.replace(CHIP, peak_flops=1e3, hbm_bandwidth=1e6)  # slow products, fast memory
    line = roofline(parse(PROGRAM), [], mesh, chip, ())
    assert line.compute == pytest.approx(5 * FLOPS / 1e3)
    assert line.memory == pytest.approx((5 * PRODUCT_BYTES + SUM_BYTES) / 1e6)
    assert line.device == pytest.approx(line.compute + SUM_BYTES / 1e6)  # each instruction's slower part
    assert (line.interconnect, line.step, line.bound) == (0, line.device, "compute")
    other = roofline(parse(PROGRAM), [], mesh, dataclasses.replace(chip, peak_flops=1e9), ())
    assert (other.device, other.bound) == (pytest.approx(line.memory), "memory")


@pytest.mark.parametrize("step", ["train", "decode"])
def test_parts_add_up(step):
    plan, compiled = planned(step)
    line, program, chip = plan.roofline, compiled.step.program, topology().chip
    assert line.step == line.device + line.interconnect == plan.predicted_step_seconds
    assert max(line.compute, line.memory) <= line.device * (1 + 1e-9) <= (line.compute + line.memory) * (1 + 1e-9)
    assert line.compute == pytest.approx(matmul_flops(program) / chip.peak_flops)
    assert line.compute == pytest.approx(plan.flops_per_device / chip.peak_flops)
    assert line.memory == pytest.approx(memory_traffic(program) / chip.hbm_bandwidth)
    each = [collective_seconds(one, compiled.step.mesh, chip, ()) for one in plan.collectives]
    assert line.interconnect == pytest.approx(sum(each))
    assert line.bound == max(("compute", "memory", "interconnect"), key=lambda part: getattr(line, part))


def test_a_collective_is_timed_as_often_as_it_runs():
    mesh = build_mesh(MESH)
    one = Collective("all-to-all", ("expert",), 1, 1000)
    three = Collective("all-to-all", ("expert",), 3, 3000)
    once = network.seconds("all-to-all", 1000, [2], CHIP, (), False)
    assert collective_seconds(one, mesh, CHIP, ()) == pytest.approx(once)
    assert collective_seconds(three, mesh, CHIP, ()) == pytest.approx(3 * once)
    assert collective_seconds(Collective("all-to-all", ("tensor",), 1, 1000), mesh, CHIP, ()) == 0


def on_slices(shape, slices, order):
    """A mesh of fake TPU devices; ``order`` says which axis runs over slices."""
    devices = np.empty(int(np.prod(shape)), dtype=object)
    each = len(devices) // slices
    devices[:] = [
        SimpleNamespace(id=number, platform="tpu", slice_index=number // each, process_index=0, device_kind="TPU v5")
        for number in range(len(devices))
    ]
    at = AXES.index(order)
    outer = (slices, *(size // slices if axis == at else size for axis, size in enumerate(shape)))
    grid = np.moveaxis(devices.reshape(outer), 0, at).reshape(shape)
    return SimpleNamespace(devices=grid, axis_names=AXES, shape=dict(zip(AXES, shape, strict=True)))


@pytest.mark.parametrize(
    ("order", "axes", "slices"),
    [
        ("data", ("data",), 2),
        ("data", ("expert",), 1),
        ("data", ("fsdp", "expert"), 1),
        ("data", ("data", "tensor"), 2),
        ("expert", ("expert",), 2),
        ("expert", ("data",), 1),
        ("expert", AXES, 2),
    ],
)
def test_which_axes_cross_slices(order, axes, slices):
    assert slices_of(on_slices((2, 1, 4, 1), 2, order), axes) == slices


def test_simulated_devices_are_one_slice():
    assert slices_of(build_mesh(MESH), AXES) == 1
    assert isinstance(build_mesh(MESH), Mesh)
    assert jax.devices()[0].platform == "cpu"


def test_crossing_slices_is_slower():
    one = Collective("all-reduce", ("data",), 1, 10**6)
    near, far = on_slices((2, 1, 4, 1), 2, "expert"), on_slices((2, 1, 4, 1), 2, "data")
    assert collective_seconds(one, far, CHIP, ()) > 5 * collective_seconds(one, near, CHIP, ())
