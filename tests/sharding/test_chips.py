"""Chips: every figure has its source, the table agrees with a second one and with libtpu, CPUs are measured."""

import math
import os
import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import SingleDeviceSharding

from gshardx.plan.topology import open_topology, prepare
from gshardx.sharding import chips
from gshardx.sharding.chips import CHIPS, FIGURES, chip_of, measure_cpu

TPUS = [name for name, chip in CHIPS.items() if chip.torus_dimensions]

# The scaling book's own tables (jax-ml.github.io/scaling-book/tpus and /gpus): FLOP/s and bytes/s of a chip's memory,
# bytes/s of a link (TPU) or of all NVLink ports (GPU) in one direction.
BOOK = {
    "v4": (2.75e14, 1.2e12, 4.5e10),
    "v5e": (1.97e14, 8.1e11, 4.5e10),
    "v5p": (4.59e14, 2.8e12, 9e10),
    "v6e": (9.2e14, 1.6e12, 9e10),
    "a100": (3.1e14, 2.0e12, 3e11),
    "h100": (9.9e14, 3.4e12, 4.5e11),
    "h200": (9.9e14, 4.8e12, 4.5e11),
    "b200": (2.3e15, 8.0e12, 9e11),
}


@pytest.mark.parametrize("name", CHIPS)
def test_every_figure_has_its_source(name):
    chip = CHIPS[name]
    assert set(chip.sources) == set(FIGURES)
    for figure in FIGURES:
        assert 0 < getattr(chip, figure) < math.inf
        assert "http" in chip.sources[figure] or "openxla" in chip.sources[figure] or "recalled" in chip.sources[figure]


@pytest.mark.parametrize("name", BOOK)
def test_the_table_agrees_with_a_second_one(name):
    flops, memory, link = BOOK[name]
    assert CHIPS[name].peak_flops == pytest.approx(flops, rel=0.03)
    assert CHIPS[name].hbm_bandwidth == pytest.approx(memory, rel=0.03)
    assert CHIPS[name].ici_bandwidth == pytest.approx(link, rel=0.12)  # vendors round ICI up by 10 %


def test_the_devices_of_a_chip_share_its_rates():
    chip = CHIPS["tpu7x"]
    assert chip.devices_per_chip == 2
    assert chip.peak_flops * 2 == pytest.approx(2307e12)
    assert chip.hbm_bandwidth * 2 == pytest.approx(7380e9)
    assert chip.ici_bandwidth * chip.ici_links * 2 == pytest.approx(1200e9)
    assert chip.dcn_bandwidth * 2 == pytest.approx(100e9 / 8)


def test_links():
    assert [CHIPS[name].ici_links for name in ("v5e", "v5p", "h100")] == [4, 6, 1]


@pytest.fixture(params=TPUS)
def tpu(request):
    """A chip's name, and the device of one that isn't here."""
    before = dict(os.environ)
    name = f"{request.param}:2x2"
    prepare(name)
    yield request.param, open_topology(name).devices[0]
    os.environ.clear()
    os.environ.update(before)


def test_a_device_finds_its_chip(tpu):
    name, device = tpu
    assert chip_of(device) is CHIPS[name]


def test_an_unknown_device_finds_none():
    assert chip_of(jax.devices("cpu")[0]) is None


def test_no_kind_names_two_chips():
    kinds = [kind for chip in CHIPS.values() for kind in chip.device_kinds]
    assert len(kinds) == len(set(kinds))


def test_memory_is_what_libtpu_grants(tpu):
    name, device = tpu
    x = jax.ShapeDtypeStruct((2**21, 2**16), jnp.bfloat16, sharding=SingleDeviceSharding(device))
    with pytest.raises(jax.errors.JaxRuntimeError) as error:
        jax.jit(lambda x: x * 2).lower(x).compile(compiler_options={"xla_tpu_no_crash_on_oom": False})
    granted = re.search(r"exceeds available HBM \(([\d.]+)G\)", str(error.value))
    assert granted is not None, str(error.value)
    assert CHIPS[name].hbm_bytes / 2**30 == pytest.approx(float(granted[1]), abs=0.016)  # versions differ by 0.01 GiB


def test_devices_share_a_cpu(monkeypatch):
    monkeypatch.setattr(chips, "matmul_rate", lambda device: 16e9)
    monkeypatch.setattr(chips, "_copy_rate", lambda: 8e9)
    monkeypatch.setattr(chips, "_exchange", lambda devices: (3e8, 1e-4))
    one, eight = measure_cpu(jax.devices("cpu")[:1]), measure_cpu(jax.devices("cpu")[:8])
    assert (one.peak_flops, one.hbm_bandwidth, one.ici_bandwidth, one.hop_seconds) == (16e9, 8e9, 8e9, 0)
    assert (eight.peak_flops, eight.hbm_bandwidth, eight.ici_bandwidth, eight.hop_seconds) == (2e9, 1e9, 3e8, 1e-4)
    assert eight.hbm_bytes * 8 == pytest.approx(one.hbm_bytes)


def test_a_cpu_is_measured():
    chip = measure_cpu(jax.devices("cpu")[:8])
    assert set(chip.sources) == set(FIGURES)
    assert 1e6 < chip.peak_flops < 1e14
    assert 1e6 < chip.hbm_bandwidth < 1e12
    assert 1e4 < chip.ici_bandwidth < 1e12
    assert 0 < chip.hop_seconds < 1
