"""Rules lead every parameter in and out."""

import dataclasses

import numpy as np
import pytest

from gshardx.config import ModelConfig, MoEConfig
from gshardx.convert.families import FAMILIES
from gshardx.convert.source import layout_of, open_source
from gshardx.errors import BadInput
from gshardx.sharding import MeshConfig, build_mesh
from tests.convert.test_public import NAMES, PUBLIC


@pytest.mark.parametrize("name", NAMES)
def test_a_tensor_that_went_in_comes_out(name):
    layout = open_source(PUBLIC / name).layout(build_mesh(MeshConfig()))
    draw = np.random.default_rng(0)
    for piece in layout.pieces:
        tensor = draw.normal(size=piece.shape)
        leaves = piece.inwards(tensor)
        np.testing.assert_array_equal(piece.outwards(leaves), tensor)
        for leaf, values in leaves.items():
            assert values.shape == tuple(layout.shapes[leaf.name][0][len(leaf.at) :]), leaf


def test_gates_stand_before_ups():
    layout = open_source(PUBLIC / "granitemoe").layout(build_mesh(MeshConfig()))
    fused = next(piece for piece in layout.pieces if piece.name.endswith("0.block_sparse_moe.input_linear.weight"))
    tensor = np.arange(np.prod(fused.shape)).reshape(fused.shape)
    gate, up = (values for _, values in sorted(fused.inwards(tensor).items()))
    np.testing.assert_array_equal(gate[1], tensor[1, : len(gate[1].T)].T)
    np.testing.assert_array_equal(up[1], tensor[1, len(gate[1].T) :].T)


def test_a_parameter_without_a_tensor_is_named():
    model = ModelConfig(width=16, heads=2, kv_heads=2, head_dim=8, moe=MoEConfig(every=1, biases=True))
    with pytest.raises(BadInput, match=r"stack.units.sparse.feed_forward.experts.b_down .* have no such tensor"):
        layout_of(FAMILIES["mixtral"], model, 32, build_mesh(MeshConfig()))


def test_half_of_the_layers_may_be_dense():
    source = open_source(PUBLIC / "qwen2_moe")
    assert (source.model.moe.every, source.model.layers) == (2, 4)
    names = {leaf.name for piece in source.layout(build_mesh(MeshConfig())).pieces for leaf in piece.leaves}
    assert "stack.units.dense.0.feed_forward.w_up" in names
    other = dataclasses.replace(source.model, moe=dataclasses.replace(source.model.moe, every=1))
    less = layout_of(source.family, other, source.vocab, build_mesh(MeshConfig())).pieces
    assert {piece.name for piece in less} != {piece.name for piece in source.layout(build_mesh(MeshConfig())).pieces}
