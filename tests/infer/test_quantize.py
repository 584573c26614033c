"""Weights in few bits against rounding in NumPy, and an engine on them against the weights they stand for."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gshardx.infer.exchange import choose_exchange
from gshardx.infer.quantize import LARGEST, SUMMED, Quantized, quantize, quantized
from gshardx.infer.request import Request, SamplingParams
from gshardx.infer.weights import separate
from gshardx.sharding import MeshConfig
from tests.infer.answers import answered, check_against_full_pass
from tests.infer.conftest import SMALL, Model, texts


@pytest.mark.parametrize("bits", ["int8", "int4"])
@pytest.mark.parametrize(("shape", "axis", "group"), [((3, 12, 5), -2, 4), ((12, 2, 3), -3, 12), ((2, 6, 5), -2, 4)])
def test_each_group_has_its_own_scale(bits, shape, axis, group):
    weight = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    found = quantized(jnp.asarray(weight), bits, axis, group)
    columns = np.moveaxis(weight, axis, -1)
    size = group if columns.shape[-1] % group == 0 else columns.shape[-1]
    expected = np.empty_like(columns)
    for index in np.ndindex(columns.shape[:-1]):
        for start in range(0, columns.shape[-1], size):
            part = columns[index][start : start + size]
            scale = np.abs(part).max() / LARGEST[bits]
            expected[index][start : start + size] = np.round(part / scale) * scale
    np.testing.assert_allclose(np.moveaxis(np.asarray(found.astype(jnp.float32)), axis, -1), expected, atol=1e-6)
    assert found.values.dtype == jnp.int8
    assert found.values.size * (2 if bits == "int4" else 1) == weight.size
    assert found.scales.size * size == weight.size


def test_a_group_of_zeros_stays_zero():
    assert not np.asarray(quantized(jnp.zeros((4, 4)), "int4", -2).astype(jnp.float32)).any()


def arranged(model):
    return separate(model.plan, model.variables, model.mesh, choose_exchange(model.plan.config, model.mesh, 8))


def whole_again(params):
    return jax.tree.map(
        lambda leaf: leaf.astype(jnp.float32) if isinstance(leaf, Quantized) else leaf,
        params,
        is_leaf=lambda leaf: isinstance(leaf, Quantized),
    )


def bytes_of(tree):
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def test_the_large_matrices_shrink_and_nothing_else_changes(model):
    plan, variables = arranged(model)
    large = [leaf for path, leaf in jax.tree.leaves_with_path(variables.params) if path[-1].key in SUMMED]
    for bits, share in (("int8", 0.5), ("int4", 0.4)):  # groups of 8 and 16 here: scales weigh more than they would
        _, small = quantize(plan, variables, bits)
        found = [leaf for leaf in jax.tree.leaves(small.params, is_leaf=lambda leaf: isinstance(leaf, Quantized))
                 if isinstance(leaf, Quantized)]  # fmt: skip
        assert len(found) == len(large)
        assert bytes_of(found) < share * bytes_of(large)
    for path, leaf in jax.tree.leaves_with_path(small.params):
        if not any(getattr(key, "key", None) in SUMMED for key in path):
            assert leaf.dtype == (jnp.int32 if path[-1].key == "place" else jnp.float32)


@pytest.mark.parametrize(
    ("weights", "mesh"),
    [
        pytest.param("int4", MeshConfig(), marks=pytest.mark.slow),
        pytest.param("int8", MeshConfig(), marks=pytest.mark.sweep),
        pytest.param("int8", MeshConfig(fsdp=2, expert=2, tensor=2), marks=pytest.mark.sweep),
    ],
    ids=str,
)
def test_an_engine_computes_with_what_the_integers_stand_for(weights, mesh):
    model, config = Model(mesh), dataclasses.replace(SMALL, weights=weights, slots=2, budget=8)
    requests = [
        Request(str(number), prompt, SamplingParams(max_new_tokens=6, temperature=0.0, logprobs=0, ignore_end=True))
        for number, prompt in enumerate(texts(5, 3))
    ]
    plan, variables = arranged(model)
    _, small = quantize(plan, variables, weights)
    answers = answered(model.engine(config), requests)
    check_against_full_pass(plan, variables._replace(params=whole_again(small.params)), requests, answers)
