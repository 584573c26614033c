"""FLOPs of matrix products and bytes of memory, against products of letters, XLA's own count, and hand counts."""

import importlib.util
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gshardx.sharding.cost import matmul_flops, memory_traffic
from gshardx.sharding.hlo import parse

SIZES = {"b": 3, "t": 128, "m": 256, "n": 4, "d": 128, "e": 8, "c": 16, "h": 384, "l": 64}
EINSUMS = [
    "tm,mh->th",
    "tm,mh->ht",
    "mt,mh->th",
    "mt,hm->th",
    "btm,mh->bth",
    "btm,mnd->btnd",
    "btnd,ndm->btm",
    "btm,btnd->mnd",
    "ecm,emh->ech",
    "ech,ehm->ecm",
    "ecm,ech->emh",
    "ech,emh->ecm",
    "btnd,blnd->bntl",
    "bntl,blnd->btnd",
    "becm,emh->bech",
]


def shapes(einsum):
    return [tuple(SIZES[letter] for letter in term) for term in einsum.split("->")[0].split(",")]


def product(einsum):
    """2 FLOPs for each combination of all letters."""
    return 2 * math.prod(SIZES[letter] for letter in set(einsum) - set(",->"))


def compiled(function, *shapes, sharding=None, dtype=jnp.float32):
    abstract = [jax.ShapeDtypeStruct(shape, dtype, sharding=sharding) for shape in shapes]
    return jax.jit(function).lower(*abstract).compile()


def flops(executable):
    return matmul_flops(parse(executable.as_text()))


def traffic(executable):
    return memory_traffic(parse(executable.as_text()))


@pytest.mark.parametrize("einsum", EINSUMS)
def test_a_product_costs_what_its_letters_say(einsum):
    executable = compiled(lambda x, y: jnp.einsum(einsum, x, y), *shapes(einsum))
    assert flops(executable) == product(einsum)
    assert executable.cost_analysis()["flops"] == pytest.approx(product(einsum), rel=0.02)


@pytest.mark.parametrize("turns", [2, 7])
def test_in_a_loop_it_costs_so_much_each_time_whatever_xla_says(turns):
    def step(x, w):
        return jnp.tanh(x @ w), None

    executable = compiled(lambda x, w: jax.lax.scan(step, x, w)[0], (32, 64), (turns, 64, 64))
    assert flops(executable) == turns * 2 * 32 * 64 * 64
    assert executable.cost_analysis()["flops"] < 1.5 * 2 * 32 * 64 * 64


def test_nothing_but_products_is_counted():
    assert flops(compiled(lambda x: jnp.exp(x).sum(), (64, 64))) == 0


@pytest.fixture(scope="module")
def chip():
    """One TPU v5p that is not there."""
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu is not installed: pip install libtpu")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("TPU_SKIP_MDS_QUERY", "ALLOW_MULTIPLE_LIBTPU_LOAD"):
            patch.setenv(name, "1")
        devices = topologies.get_topology_desc(platform="tpu", topology_name="v5p:2x2x1").devices
    return NamedSharding(Mesh(np.array(devices[:1]), ("data",)), PartitionSpec())


@pytest.mark.parametrize("einsum", EINSUMS)
def test_so_it_does_where_tpus_make_a_convolution_of_it(einsum, chip):
    executable = compiled(lambda x, y: jnp.einsum(einsum, x, y), *shapes(einsum), sharding=chip, dtype=jnp.bfloat16)
    assert "convolution" in executable.as_text()
    assert flops(executable) == product(einsum)


@pytest.mark.parametrize("name", ["cpu_jax_0.10", "cpu_jax_0.12", "tpu_v5p_jax_0.10", "tpu_v5p_jax_0.12"])
def test_recorded_programs_cost_the_same_everywhere(name):
    """Three times two experts of [32 slots, 128] x [128, 128]."""
    text = (Path(__file__).parent / "hlo" / f"{name}.txt").read_text()
    assert matmul_flops(parse(text)) == 3 * 2 * 2 * 32 * 128 * 128


def test_gpu_products_are_custom_calls_and_fusions():
    text = (Path(__file__).parent / "hlo" / "gpu.txt").read_text()
    assert matmul_flops(parse(text)) == 3 * 2 * 64 * 32 * 16  # Triton's, cuBLAS's and cuBLASLt's


def test_a_product_reads_its_operands_and_writes_its_result():
    assert traffic(compiled(jnp.dot, (64, 256), (256, 128))) == 4 * (64 * 256 + 256 * 128 + 64 * 128)


def test_a_fusion_reads_and_writes_once():
    assert traffic(compiled(lambda x: jnp.tanh(jnp.sin(x) + 1), (1024,))) == 4 * 2 * 1024


@pytest.mark.parametrize("turns", [4, 16])
def test_a_scan_reads_each_stacked_weight_once(turns):
    """Weights of a megabyte a turn, activations of four kilobytes. On CPUs a turn's weights are copied out of the stack
    before they are multiplied: read, written, read; where the product slices them itself, they are read once."""

    def step(x, w):
        return jnp.tanh(x @ w), None

    executable = compiled(lambda x, w: jax.lax.scan(step, x, w)[0], (2, 512), (turns, 512, 512))
    weights = turns * 4 * 512 * 512
    assert weights < traffic(executable) < 3.03 * weights


def test_what_stays_in_vector_memory_is_not_traffic():
    """A prefetch reads its megabyte from main memory; the product then reads only its other operand there."""
    program = parse("""ENTRY %main (a: f32[512,512], b: f32[512,512]) -> f32[512,512] {
  %a = f32[512,512]{1,0:T(8,128)} parameter(0)
  %b = f32[512,512]{1,0:T(8,128)} parameter(1)
  %start = (f32[512,512]{1,0:T(8,128)S(1)}, f32[512,512]{1,0:T(8,128)}, u32[]{:S(2)}) copy-start(%a)
  %done = f32[512,512]{1,0:T(8,128)S(1)} copy-done(%start)
  %here = f32[512,512]{1,0:T(8,128)S(1)} negate(%done)
  ROOT %out = f32[512,512]{1,0:T(8,128)} add(%here, %b)
}""")
    megabyte = 4 * 512 * 512
    assert memory_traffic(program) == megabyte + 0 + 2 * megabyte


def test_an_update_in_place_writes_its_slice():
    """Sixteen rows of 4 kB into 4 MB, one at a time."""

    def step(carry, row):
        table, at = carry
        return (jax.lax.dynamic_update_slice(table, row[None], (at, 0)), at + 1), None

    def fill(table, rows):
        return jax.lax.scan(step, (table, 0), rows)[0][0]

    abstract = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((1024, 1024), (16, 1024))]
    executable = jax.jit(fill, donate_argnums=0).lower(*abstract).compile()
    rows, table = 4 * 16 * 1024, 4 * 1024 * 1024
    assert 2 * rows <= traffic(executable) < 8 * rows < table
