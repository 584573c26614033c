"""Meshes: four axes over the devices that are there, or that a compile-only topology describes."""

import os

import jax
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from gshardx.errors import BadInput
from gshardx.sharding import MeshConfig, build_mesh, one_program_at_a_time, simulate_devices


def test_a_mesh_has_its_four_axes_in_order_with_auto_types():
    mesh = build_mesh(MeshConfig(data=2, expert=2, tensor=2))
    assert dict(mesh.shape) == {"data": 2, "fsdp": 1, "expert": 2, "tensor": 2}
    assert mesh.axis_names == ("data", "fsdp", "expert", "tensor")
    assert set(mesh.axis_types) == {AxisType.Auto}
    assert list(mesh.devices.flat) == jax.devices()[:8]


def test_a_mesh_smaller_than_the_machine_takes_the_first_devices():
    assert list(build_mesh(MeshConfig(expert=3)).devices.flat) == jax.devices()[:3]


def test_sizes_follow_from_the_axes():
    config = MeshConfig(data=2, fsdp=3, expert=5, tensor=7)
    assert config.size == 210
    assert config.batch_shards == 30
    assert config.shape == {"data": 2, "fsdp": 3, "expert": 5, "tensor": 7}
    assert str(config) == "data 2 x fsdp 3 x expert 5 x tensor 7"
    assert MeshConfig().size == 1


@pytest.mark.parametrize("axis", ["data", "fsdp", "expert", "tensor"])
@pytest.mark.parametrize("size", [0, -1])
def test_an_axis_without_devices_is_named_with_a_size_that_works(axis, size):
    with pytest.raises(BadInput, match=rf"mesh\.{axis} = {size}: .*use 1 or more"):
        MeshConfig(**{axis: size})
    assert MeshConfig(**{axis: 1}).size == 1


def test_too_many_devices_names_what_is_asked_and_what_is_here():
    with pytest.raises(BadInput) as caught:
        build_mesh(MeshConfig(data=4, expert=16))
    message = str(caught.value)
    assert "data 4 x fsdp 1 x expert 16 x tensor 1" in message
    assert "needs 64 devices" in message
    assert "8 cpu device(s) are here" in message
    assert "at most 8" in message
    assert build_mesh(MeshConfig(data=4, expert=2)).size == 8


def test_simulated_devices_are_asked_for_beside_the_users_own_flags(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_enable_fast_math=false")
    simulate_devices(6)
    flags = os.environ["XLA_FLAGS"].split()
    assert "--xla_cpu_enable_fast_math=false" in flags
    assert "--xla_force_host_platform_device_count=6" in flags
    assert any("collective_call_terminate_timeout" in flag for flag in flags)
    simulate_devices(6)
    assert os.environ["XLA_FLAGS"].split() == flags


def test_a_device_count_that_the_user_has_set_stays(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=3")
    simulate_devices(6)
    assert os.environ["XLA_FLAGS"].count("device_count") == 1
    assert "device_count=3" in os.environ["XLA_FLAGS"]


def test_only_several_simulated_devices_must_be_waited_for():
    assert one_program_at_a_time(build_mesh(MeshConfig(expert=2)))
    assert not one_program_at_a_time(build_mesh(MeshConfig()))


# Where devices go when their links are not alike


class Device:
    """What build_mesh reads of a device; JAX's own have no slice_index where there is one slice."""

    def __init__(self, **facts):
        self.__dict__.update({"process_index": 0, "core_on_chip": 0, "device_kind": "TPU v5 lite", **facts})


def tpus(slices, x, y):
    places = [(s, i, j) for s in range(slices) for j in range(y) for i in range(x)]
    return [
        Device(id=n, platform="tpu", coords=(i, j, 0), **({"slice_index": s} if slices > 1 else {}))
        for n, (s, i, j) in enumerate(places)
    ]


def gpus(hosts, each, domain):
    return [Device(id=n, platform="gpu", **{domain: n // each}) for n in range(hosts * each)]


def islands_along(mesh, axis, island):
    """For each line of devices along ``axis``: the islands that it touches."""
    at = mesh.axis_names.index(axis)
    lines = np.moveaxis(mesh.devices, at, -1).reshape(-1, mesh.devices.shape[at])
    return {frozenset(island(device) for device in line) for line in lines}


def slice_of(device):
    return device.slice_index


@pytest.mark.parametrize(
    ("config", "slices", "crossing"),
    [
        (MeshConfig(data=2, fsdp=2, expert=4, tensor=2), 2, "data"),
        (MeshConfig(data=1, fsdp=4, expert=4, tensor=2), 2, "fsdp"),
        (MeshConfig(expert=16, tensor=2), 2, "expert"),
        (MeshConfig(data=2, fsdp=2, expert=4, tensor=4), 4, "data fsdp"),
        (MeshConfig(data=3, fsdp=2, expert=4, tensor=2), 3, "data"),
        (MeshConfig(data=3, fsdp=2, expert=8), 6, "data fsdp"),
    ],
    ids=str,
)
def test_the_slow_network_carries_data_then_fsdp_then_expert(config, slices, crossing):
    mesh = build_mesh(config, tpus(slices, 4, config.size // slices // 4))
    assert dict(mesh.shape) == config.shape
    assert set(mesh.axis_types) == {AxisType.Auto}
    assert sorted(device.id for device in mesh.devices.flat) == list(range(config.size))
    assert {axis for axis in config.shape if any(len(line) > 1 for line in islands_along(mesh, axis, slice_of))} == set(
        crossing.split()
    )


def test_every_axis_stays_in_blocks_of_one_slice():
    """An axis of which a part crosses: experts 0 to 3 on one slice, 4 to 7 on the other."""
    mesh = build_mesh(MeshConfig(expert=8), tpus(2, 2, 2))
    assert [device.slice_index for device in mesh.devices.flat] == [0] * 4 + [1] * 4


@pytest.mark.parametrize("domain", ["slice_index", "process_index"])
def test_gpus_of_several_hosts_keep_tensor_and_expert_inside_one(domain):
    mesh = build_mesh(MeshConfig(data=2, fsdp=2, expert=4, tensor=2), gpus(4, 8, domain))
    for axis, hosts in {"data": 2, "fsdp": 2, "expert": 1, "tensor": 1}.items():
        assert {len(line) for line in islands_along(mesh, axis, lambda d: getattr(d, domain))} == {hosts}, axis


def test_tensor_never_crosses_slices_and_the_message_gives_a_mesh_that_works():
    devices = tpus(4, 4, 2)
    with pytest.raises(BadInput) as caught:
        build_mesh(MeshConfig(data=2, tensor=16), devices)
    message = str(caught.value)
    assert "mesh (data 2 x fsdp 1 x expert 1 x tensor 16) on 4 slices or hosts of 8 devices" in message
    assert "data * fsdp * expert = 2 is not a multiple of 4" in message
    assert "use mesh (data 4 x fsdp 1 x expert 1 x tensor 8)" in message
    assert build_mesh(MeshConfig(data=4, tensor=8), devices).size == 32


def test_a_slice_is_taken_whole_or_not_at_all():
    devices = tpus(2, 4, 4)
    with pytest.raises(BadInput, match=r"takes 8 of the 16 devices of its last slice or host; .* one of 16, 32"):
        build_mesh(MeshConfig(fsdp=3, expert=8), devices)
    assert islands_along(build_mesh(MeshConfig(expert=16), devices), "expert", slice_of) == {frozenset({0})}


def test_neighbours_on_an_axis_of_tpus_are_neighbours_on_the_torus():
    """16 in one line: a ring over a 4x4 torus, where rows of the plain order would jump."""
    ring = [d.coords for d in build_mesh(MeshConfig(expert=16), tpus(1, 4, 4)).devices.flat]
    for (a, b, _), (c, d, _) in zip(ring, ring[1:] + ring[:1], strict=True):
        steps = [min((a - c) % 4, (c - a) % 4), min((b - d) % 4, (d - b) % 4)]
        assert sum(steps) == 1, ring


def test_tpus_that_form_no_torus_keep_their_order_and_say_so():
    devices = tpus(1, 4, 4)
    with pytest.warns(UserWarning, match="do not form a torus; kept in order"):
        mesh = build_mesh(MeshConfig(fsdp=5), devices)
    assert [d.id for d in mesh.devices.flat] == [0, 1, 2, 3, 4]


@pytest.fixture(scope="module")
def two_slices():
    """Two v5e slices of 4x4 chips, compile-only."""
    pytest.importorskip("libtpu", reason="libtpu is not installed: pip install libtpu")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TPU_SKIP_MDS_QUERY", "1")
        patch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
        return topologies.get_topology_desc(
            platform="tpu", topology_name="v5e:4x4", num_slices=2, chips_per_host_bounds=(2, 2, 1)
        ).devices


@pytest.mark.parametrize(
    "config",
    [
        MeshConfig(data=2, expert=16),
        MeshConfig(data=2, fsdp=2, expert=4, tensor=2),
        MeshConfig(fsdp=8, expert=2, tensor=2),
        MeshConfig(data=2, expert=8, tensor=2),
        MeshConfig(data=32),
    ],
    ids=str,
)
def test_on_real_slices_no_tensor_or_expert_group_leaves_one(two_slices, config):
    mesh = build_mesh(config, two_slices)
    assert mesh.size == len({device.id for device in mesh.devices.flat}) == 32
    for axis in ("expert", "tensor"):
        assert all(len(slices) == 1 for slices in islands_along(mesh, axis, slice_of)), axis


def test_a_program_compiles_for_the_slices(two_slices):
    mesh = build_mesh(MeshConfig(data=2, expert=16), two_slices)
    batch = jax.ShapeDtypeStruct((64, 8), np.float32, sharding=NamedSharding(mesh, PartitionSpec(("data", "expert"))))
    assert "all-reduce" in jax.jit(lambda x: x.sum()).lower(batch).compile().as_text()


def test_simulated_devices_are_shared_out_to_processes(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "")
    simulate_devices(8, processes=2)
    assert "--xla_force_host_platform_device_count=4" in os.environ["XLA_FLAGS"]
    with pytest.raises(BadInput, match=r"9 device\(s\) does not divide over 2 processes; use 10 devices"):
        simulate_devices(9, processes=2)
