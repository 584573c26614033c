"""The accelerators' kernels: in JAX's interpreter against their twin, and compiled for chips that are not there."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gshardx.layers import FullPages, KernelPages, Paged, has_kernel, kernel_attention, paged_attention
from gshardx.layers.paged import _store_and_attend
from gshardx.plan.topology import open_topology, prepare
from gshardx.sharding import MeshConfig, abstract_array, build_mesh

PAGES, KV, SIZE, D, N = 9, 2, 16, 128, 8
HAS_CUDA = importlib.util.find_spec("jax_cuda12_plugin") is not None
TOPOLOGIES = [
    ("tpu", "v5e:2x2"),
    ("tpu", "v6e:2x2"),
    pytest.param("gpu", "h100:4", marks=pytest.mark.skipif(not HAS_CUDA, reason="the CUDA plug-in is not installed")),
]

store_and_attend = jax.jit(_store_and_attend)


def stored(platform, k, v, page, place):
    """The same tokens in both kinds of pages."""
    by_head, keys, values = (
        jnp.zeros(shape, jnp.bfloat16) for shape in ((KV, PAGES, SIZE, D), (PAGES, KV, D, SIZE), (PAGES, KV, SIZE, D))
    )
    plain = FullPages(keys, values)
    return [pool.put(page, place, k, v) for pool in (KernelPages(by_head, by_head, platform), plain)]


@pytest.mark.parametrize("platform", ["tpu", "gpu"])
def test_the_same_as_the_twin(platform):
    draw = np.random.default_rng(0)
    length, table = 61, np.asarray([4, 2, 8, 1], np.int32)
    q, k, v = (draw.normal(size=(length, heads, D)).astype(np.float32) for heads in (N, KV, KV))
    at = np.arange(length)
    pools = stored(platform, k, v, table[at // SIZE], at % SIZE)
    rows = np.asarray([0, 15, 16, 37, 60, 3])
    positions = jnp.asarray([*rows[:-1], -1], jnp.int32)
    tables = jnp.tile(table, (len(rows), 1))
    found = kernel_attention(jnp.asarray(q[rows]), pools[0], tables, positions, interpret=True)
    expected = paged_attention(jnp.asarray(q[rows]), pools[1], tables, positions, jnp.int32(4))
    np.testing.assert_allclose(found[:-1], expected[:-1], atol=0.02)  # of numbers around 1, in bfloat16
    assert np.isfinite(found).all()
    for one, other in zip(pools[0].read(jnp.asarray(table)), pools[1].read(jnp.asarray(table)), strict=True):
        np.testing.assert_array_equal(one, other)


def test_queries_of_another_dtype_are_answered_by_the_twin():
    draw, position = np.random.default_rng(0), jnp.asarray([3, 3], jnp.int32)
    q, k, v = (jnp.asarray(draw.normal(size=(2, heads, D)), jnp.float32) for heads in (N, KV, KV))
    tables, sequence = jnp.asarray([[4], [2]], jnp.int32), jnp.arange(2)
    pools = stored("tpu", k, v, jnp.asarray([4, 2]), jnp.asarray([0, 0]))
    found, expected = (store_and_attend(q, k, v, one, tables, sequence, position, jnp.int32(1))[0] for one in pools)
    np.testing.assert_array_equal(found, expected)


def test_what_is_not_finite_is_not_stored():
    k = jnp.full((1, KV, D), jnp.nan).at[0, 0, 0].set(1.0)
    pool, _ = stored("tpu", k, jnp.full_like(k, -jnp.inf), jnp.asarray([3]), jnp.asarray([5]))
    assert pool.k[0, 3, 5, 0] == 1
    assert np.isfinite(pool.k).all()
    assert not pool.v.any()


@pytest.mark.parametrize(("platform", "topology"), TOPOLOGIES)
def test_compiled_for(platform, topology):
    """Sequences split over a batch axis and heads over ``tensor``: the kernel, and nothing sent."""
    if platform == "tpu":
        pytest.importorskip("libtpu")
    dtype = "bfloat16"
    assert has_kernel(platform, dtype, SIZE, D)
    prepare(topology)
    mesh = build_mesh(MeshConfig(data=2, tensor=2), open_topology(topology).devices)

    def array(shape, dtype, axes):
        return abstract_array(shape, jnp.dtype(dtype), axes.split(), mesh)

    pages = array((2, KV, PAGES, SIZE, D), dtype, KernelPages.AXES)
    memory = Paged(
        (KernelPages(pages, pages, platform),), array((2, 4, 4), "int32", "batch time slot"),
        array((2, 8), "int32", "batch time"), array((2, 8), "int32", "batch time"), array((), "int32", ""),
    )  # fmt: skip
    q = array((2, 8, N, D), dtype, "batch time heads head_dim")
    new = array((2, 8, KV, D), dtype, "batch time kv_heads head_dim")
    with jax.set_mesh(mesh):
        compiled = jax.jit(lambda memory, q, k, v: memory.attend(0, q, k, v)).lower(memory, q, new, new).compile()
    text = compiled.as_text()
    assert {"tpu": "tpu_custom_call", "gpu": "triton"}[platform] in text
    assert not [name for name in ("all-gather", "all-to-all", "all-reduce", "collective-permute") if name in text]


def test_shapes_without_a_kernel():
    assert not has_kernel("cpu", "bfloat16", 16, 128)
    assert not has_kernel("tpu", "bfloat16", 16, 64)
    assert not has_kernel("gpu", "bfloat16", 48, 128)
    assert not has_kernel("gpu", "float32", 16, 128)
