"""Meshes: four axes over the devices that are there."""

import os

import jax
import pytest
from jax.sharding import AxisType

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
