"""Topologies: the chips that a name stands for, one line for each mistake, no noise, two processes at once."""

import importlib.util
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gshardx.errors import BadInput
from gshardx.plan import topology
from gshardx.plan.gpu_target import target_config
from gshardx.plan.topology import Topology, open_topology, prepare
from gshardx.sharding.chips import CHIPS

HAS_CUDA = importlib.util.find_spec("jax_cuda12_plugin") is not None


def opened(name: str, slices: int = 1) -> Topology:
    prepare(name)
    return open_topology(name, slices)


def exchange(devices):
    """A compiled all-to-all over the devices, from shapes alone."""
    mesh = Mesh(np.array(devices), ("all",))
    swap = jax.shard_map(
        lambda x: jax.lax.all_to_all(x, "all", 1, 0, tiled=True),
        mesh=mesh,
        in_specs=PartitionSpec("all"),
        out_specs=PartitionSpec("all"),
    )
    x = jax.ShapeDtypeStruct((1024, 512), jnp.bfloat16, sharding=NamedSharding(mesh, PartitionSpec("all")))
    return jax.jit(swap).lower(x).compile()


@pytest.mark.parametrize(
    ("name", "devices", "torus"),
    [
        ("v4:2x2x1", 4, (2, 2, 1)),
        ("v4:2x2", 4, (2, 2, 1)),
        ("v4:4x4x4", 64, (4, 4, 4)),
        ("v5e:1x1", 1, (1, 1)),
        ("v5e:1x2", 2, (1, 2)),
        ("v5e:2x1", 2, (2, 1)),
        ("v5e:2x2", 4, (2, 2)),
        ("v5e:16x16", 256, (16, 16)),
        ("v5p:1x1x1", 1, (1, 1, 1)),
        ("v5p:2x2x3", 12, (2, 2, 3)),
        ("v5p:8x16x16", 2048, (8, 16, 16)),
        ("v5p:16x20x28", 8960, (16, 20, 28)),
        ("v6e:2x4", 8, (2, 4)),
        ("tpu7x:1x1x1", 2, (1, 1, 1)),
        ("tpu7x:4x4x4", 128, (4, 4, 4)),
    ],
)
def test_a_tpu_slice_opens_without_a_tpu(name, devices, torus):
    found = opened(name)
    assert len(found.devices) == devices
    assert found.torus == torus
    assert found.slices == 1
    assert found.chip is CHIPS[name.split(":")[0]]
    assert found.devices[0].device_kind in found.chip.device_kinds
    farthest = max(tuple(device.coords) for device in found.devices)
    assert farthest[: len(torus)] == tuple(extent - 1 for extent in torus)


def test_slices_are_told_apart():
    found = opened("v5e:4x4", slices=2)
    assert found.slices == 2
    assert [device.slice_index for device in found.devices] == [0] * 16 + [1] * 16


def test_a_slice_compiles_without_a_tpu():
    compiled = exchange(opened("v5e:2x2").devices)
    assert "all-to-all" in compiled.as_text()
    assert compiled.memory_analysis().peak_memory_in_bytes > 0


def test_simulated_devices_are_the_first_of_those_here():
    found = opened("cpu:4")
    assert found.devices == tuple(jax.devices("cpu")[:4])
    assert (found.torus, found.slices, found.chip.name) == ((), 1, "cpu")


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("v5q:4x4", "no family 'v5q'; did you mean v5p:4x4?"),
        ("V5P:2x2x2", "did you mean v5p:2x2x2?"),
        ("locl", "did you mean local?"),
        ("local:3", "use local"),
        ("v5p", "'' is no shape"),
        ("v5p:2xy", "'2xy' is no shape"),
        ("v5p:-2x2x2", "'-2x2x2' is no shape"),
        ("v5e:0x2", "every extent is at least 1"),
        ("cpu:0", "every extent is at least 1"),
        ("cpu:2x2", "use cpu:4"),
        ("v5e:4", "write v5e:AxB"),
        ("v5e:2x2x2", "write v5e:AxB"),
        ("v5p:2x2x2x2", "write v5p:AxBxC"),
        ("v5e:3x5", "v5e:2x4 or v5e:4x6 would work"),
        ("v5e:1x4", "; v5e:2x4 would work"),
        ("v5p:3x3x3", "v5p:2x2x3 or v5p:4x4x3 would work"),
        ("v5e:16x32", "largest v5e slice is 16x16, 256 chips"),
        ("v5p:32x32x32", "largest v5p slice is 16x20x28, 8960 chips"),
        ("h100:2x16", "write h100:4x8"),
        ("h100:2x2x2", "write h100:2x8 or h100:8"),
    ],
)
@pytest.mark.parametrize("function", [prepare, open_topology])
def test_a_wrong_name_gets_a_line(function, name, line):
    with pytest.raises(BadInput) as error:
        function(name)
    assert str(error.value).startswith(f"topology {name}: ")
    assert line in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["v5e:3x5", "v5e:1x4", "v6e:7x2", "v5p:3x3x3", "v4:1x4x4", "tpu7x:5x2x1"])
def test_the_shapes_that_a_line_offers_do_open(name):
    with pytest.raises(BadInput) as error:
        prepare(name)
    offered = re.findall(r"\w+:\d+x[\dx]*\d", str(error.value).split(";")[1])
    assert offered
    for shape in offered:
        assert opened(shape).devices


@pytest.mark.parametrize(
    ("name", "slices", "line"),
    [
        ("v5e:2x2", 0, "slices = 0: use 1 or more"),
        ("cpu:4", 2, "leave slices at 1"),
        ("local", 2, "leave slices at 1"),
        ("h100:8", 2, "write the hosts into the name"),
    ],
)
def test_wrong_slices_get_a_line(name, slices, line):
    with pytest.raises(BadInput, match=line):
        open_topology(name, slices)


def test_more_simulated_devices_than_there_are():
    with pytest.raises(BadInput, match=r"topology cpu:9: 8 CPU device.*xla_force_host_platform_device_count=9"):
        opened("cpu:9")


def test_without_libtpu_the_line_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.delenv("TPU_LIBRARY_PATH", raising=False)
    with pytest.raises(BadInput, match=r"libtpu is missing; pip install 'gshardx\[tpu\]' \(or: pip install libtpu\)"):
        opened("v5e:2x2")


def test_a_refusal_of_libtpu_becomes_one_line(monkeypatch):
    def refuse(**_):
        raise jax.errors.JaxRuntimeError("INVALID_ARGUMENT: no such\n  layout")

    monkeypatch.setattr(topology.topologies, "get_topology_desc", refuse)
    with pytest.raises(BadInput, match=r"topology v5e:2x2: libtpu refuses it .INVALID_ARGUMENT: no such layout"):
        opened("v5e:2x2")


@pytest.mark.skipif(HAS_CUDA, reason="the CUDA plug-in is installed")
def test_without_the_cuda_plugin_the_line_says_what_to_install():
    with pytest.raises(BadInput, match=f"pip install jax-cuda12-plugin=={re.escape(jax.__version__)} "):
        opened("h100:8")


@pytest.mark.skipif(not HAS_CUDA, reason="needs jax-cuda12-plugin, jax-cuda12-pjrt and nvidia-cuda-nvcc-cu12")
@pytest.mark.parametrize("name", ["a100:8", "a100-40:2", "h100:4x8", "h200:8", "b200:2x4"])
def test_gpus_open_and_compile_without_a_gpu(name):
    found = opened(name)
    *hosts, gpus = map(int, name.split(":")[1].split("x"))
    assert found.slices == (hosts or [1])[0]
    assert len(found.devices) == found.slices * gpus
    assert len({device.process_index for device in found.devices}) == found.slices
    assert found.devices[0].device_kind in found.chip.device_kinds
    assert "all-to-all" in exchange(found.devices).as_text()


def test_every_gpu_has_a_target():
    gpus = [chip for chip in CHIPS.values() if not chip.torus_dimensions]
    assert len(gpus) == 5
    for chip in gpus:
        assert f"device_memory_size: {chip.hbm_bytes:.0f}\n" in target_config(chip)


def attached(kind, platform, places):
    return [
        SimpleNamespace(device_kind=kind, platform=platform, coords=coords, slice_index=index)
        for coords, index in places
    ]


def test_local_tpus_span_a_torus(monkeypatch):
    places = [((x, y, 0), index) for index in range(2) for y in range(4) for x in range(2)]
    monkeypatch.setattr(jax, "devices", lambda *_: attached("TPU v5 lite", "tpu", places))
    found = opened("local")
    assert (found.chip, found.torus, found.slices) == (CHIPS["v5e"], (2, 4), 2)


def test_local_gpus_have_no_torus(monkeypatch):
    monkeypatch.setattr(jax, "devices", lambda *_: attached("NVIDIA H200", "gpu", [(None, None)]))
    found = opened("local")
    assert (found.chip, found.torus, found.slices) == (CHIPS["h200"], (), 1)


def test_a_local_accelerator_without_figures_gets_a_line(monkeypatch):
    monkeypatch.setattr(jax, "devices", lambda *_: attached("NVIDIA T4", "gpu", [(None, None)]))
    with pytest.raises(BadInput, match="no figures for 'NVIDIA T4' devices; there are some for TPU v4, "):
        opened("local")


@pytest.mark.slow
def test_two_processes_open_slices_at_once_and_print_nothing():
    program = (
        "from gshardx.plan.topology import open_topology, prepare\n"
        "prepare('v5e:4x4')\n"
        "print(len(open_topology('v5e:4x4', 2).devices), flush=True)\n"
        "input()"
    )
    names = ("TPU_", "JAX_", "XLA_", "ALLOW_MULTIPLE_LIBTPU_LOAD")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(names)}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    processes = [subprocess.Popen([sys.executable, "-c", program], env=environment, **pipes) for _ in range(2)]
    counts = [process.stdout.readline() for process in processes]  # both hold libtpu from here on
    ends = [process.communicate(b"\n", timeout=120) for process in processes]
    assert counts == [b"32\n"] * 2, ends
    assert [(process.returncode, stderr) for process, (_, stderr) in zip(processes, ends, strict=True)] == [
        (0, b"")
    ] * 2
