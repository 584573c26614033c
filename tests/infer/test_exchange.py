"""Which way to the experts sends, then reads, fewest bytes, counted by hand."""

import dataclasses

import pytest

from gshardx.errors import BadInput
from gshardx.infer.exchange import choose_exchange, exchanges
from gshardx.infer.weights import fewer_experts
from gshardx.models.build import blueprint
from gshardx.sharding import MeshConfig, build_mesh
from tests.infer.conftest import MODEL


def config(experts, dtype="float32", hidden=8):
    moe = dataclasses.replace(MODEL.moe, num_experts=experts, hidden=hidden)
    return dataclasses.replace(MODEL, dtype=dtype, moe=moe)


@pytest.mark.parametrize("devices", [2, 4, 8])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bytes_of_a_token(devices, dtype):
    """To all other devices and back in fp32; or a slot at each expert that is elsewhere, there and back."""
    size, elsewhere = {"float32": 4, "bfloat16": 2}[dtype], 16 - 16 // devices
    mesh = build_mesh(MeshConfig(expert=devices))
    replicate, all_to_all, sliced = exchanges(config(16, dtype, hidden=512), mesh, 64)
    assert replicate.sent == sliced.sent == (devices - 1) * MODEL.width * (size + 4)
    assert all_to_all.sent == 2 * elsewhere * MODEL.width * size


@pytest.mark.parametrize(
    ("experts", "dtype", "hidden", "rows", "expected"),
    [
        (16, "float32", 8, 64, "replicate"),
        (8, "bfloat16", 8, 64, "all_to_all"),  # one expert a device: slots of half as wide numbers are less than sums
        (16, "float32", 512, 64, "replicate"),  # all experts are read anyway
        (64, "float32", 512, 4, "sliced"),  # 8 experts are chosen, perhaps all of one device
        (64, "float32", 256, 4, "replicate"),  # slices would be too narrow
    ],
)
def test_the_fewest_bytes_win(experts, dtype, hidden, rows, expected):
    mesh = build_mesh(MeshConfig(expert=8))
    assert choose_exchange(config(experts, dtype, hidden), mesh, rows).name == expected


def test_on_one_device_nothing_is_sent():
    assert choose_exchange(config(8), build_mesh(MeshConfig()), 4).sent == 0


def test_slices_that_would_be_too_narrow_are_refused():
    with pytest.raises(BadInput, match="8 hidden units of an expert do not make 8 slices of 64 or more; use replicate"):
        choose_exchange(config(8), build_mesh(MeshConfig(expert=8)), 4, "sliced")


@pytest.mark.parametrize("moe", [{"router": "relu", "losses": {"sparsity": 1.0}}, {"router": "dselect_k"}], ids=str)
def test_no_draft_has_fewer_experts_where_top_k_bounds_nothing(moe):
    config, mesh = dataclasses.replace(MODEL, moe=dataclasses.replace(MODEL.moe, **moe)), build_mesh(MeshConfig())
    plan, exchange = blueprint(config, 64, mesh), choose_exchange(config, mesh, 1)
    with pytest.raises(BadInput, match=r"top_k does not bound router .*; use the drafter prompt_lookup"):
        fewer_experts(plan, 1, mesh, exchange)
