"""Weights of four bits: against their definition bit by bit, transformers where it is installed, and in files."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from gshardx.convert.families import FAMILIES
from gshardx.convert.incoming import convert_in
from gshardx.convert.mxfp4 import decoded
from gshardx.convert.outgoing import convert_out
from gshardx.convert.source import layout_of, understood
from gshardx.convert.tensors import open_tensors
from gshardx.errors import BadInput
from gshardx.sharding import MeshConfig, build_mesh
from tests.convert.packed_files import write
from tests.convert.test_public import PUBLIC


def value(bits):
    """Of sign, two bits of exponent with bias 1, and one of mantissa; OCP Microscaling Formats 1.0, section 5.3.3."""
    sign, exponent, mantissa = -1 if bits >> 3 else 1, bits >> 1 & 3, bits & 1
    return sign * (mantissa / 2 if exponent == 0 else 2.0 ** (exponent - 1) * (1 + mantissa / 2))


def twin(blocks, scales):
    e, n, count = scales.shape
    out = np.zeros((e, 32 * count, n))
    for expert, row, block in np.ndindex(e, n, count):
        for place in range(32):
            byte = int(blocks[expert, row, block, place // 2])
            bits = byte >> 4 if place % 2 else byte & 15
            out[expert, 32 * block + place, row] = value(bits) * 2.0 ** (int(scales[expert, row, block]) - 127)
    return out


@pytest.fixture
def packed():
    draw = np.random.default_rng(0)
    return (draw.integers(0, 256, (2, 3, 2, 16)).astype(np.uint8), draw.integers(100, 140, (2, 3, 2)).astype(np.uint8))


def test_each_value_is_exact(packed):
    found = decoded(*packed)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_array_equal(found.astype(np.float64), twin(*packed))


def test_a_scale_that_is_no_number_makes_none(packed):
    blocks, scales = packed
    scales[1, 2, 0] = 255
    bad = np.isnan(decoded(blocks, scales).astype(np.float32))
    assert bad[1, :32, 2].all()
    assert bad.sum() == 32


def test_transformers_decodes_alike(packed):
    torch, mxfp4 = pytest.importorskip("torch"), pytest.importorskip("transformers.integrations.mxfp4")
    theirs = mxfp4.convert_moe_packed_tensors(*(torch.from_numpy(part) for part in packed))
    np.testing.assert_array_equal(decoded(*packed).astype(np.float32), theirs.float().numpy())


def test_a_quantised_model_comes_in_and_goes_out_as_bfloat16(tmp_path):
    """GPT-OSS's own files: the fixture's experts, packed, with numbers that four bits can hold."""
    theirs, draw = tmp_path / "theirs", np.random.default_rng(0)
    theirs.mkdir()
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = json.loads((PUBLIC / "gpt_oss" / "config.json").read_text()) | sizes
    (theirs / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "mxfp4"}}))
    mesh = build_mesh(MeshConfig())
    layout = layout_of(FAMILIES["gpt_oss"], understood(config, FAMILIES["gpt_oss"], "here"), 48, mesh)
    packed, plain = {}, {}
    for piece in layout.pieces:
        if piece.name.endswith(("gate_up_proj", "down_proj")):
            e, d, n = piece.shape
            packed[piece.name + "_blocks"] = draw.integers(0, 256, (e, n, d // 32, 16)).astype(np.uint8)
            packed[piece.name + "_scales"] = draw.integers(118, 124, (e, n, d // 32)).astype(np.uint8)
        else:
            plain[piece.name] = draw.normal(size=piece.shape).astype(jnp.bfloat16)
    write(theirs / "model.safetensors", packed | plain)
    said = []
    convert_in(theirs, tmp_path / "run", None, said.append)
    convert_out(tmp_path / "run", tmp_path / "back", say=said.append)
    assert "it came quantised, and goes out as bfloat16, without quantization_config" in said[-2]
    assert "quantization_config" not in json.loads((tmp_path / "back" / "config.json").read_text())
    back = open_tensors(tmp_path / "back")
    for name, value in plain.items():
        np.testing.assert_array_equal(back.read(name), value)
    for name in (name.removesuffix("_blocks") for name in packed if name.endswith("_blocks")):
        expected = twin(packed[name + "_blocks"], packed[name + "_scales"])
        np.testing.assert_array_equal(back.read(name).astype(np.float64), expected)


def test_blocks_and_scales_are_one_tensor_of_a_file(packed, tmp_path):
    write(tmp_path / "model.safetensors", {"w_blocks": packed[0], "w_scales": packed[1]})
    tensors = open_tensors(tmp_path)
    about = tensors.by_name["w"]
    assert (list(tensors.by_name), about.shape, about.dtype.name) == (["w"], (2, 64, 3), "bfloat16")
    np.testing.assert_array_equal(tensors.read("w").astype(np.float64), twin(*packed))


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (("w_blocks", "v_scales"), r"w_blocks is of type uint8, without scales"),
        (("w_scales", "w_blocks"), r"w_scales \[2, 3, 2, 16\] does not suit w_blocks \[2, 3, 2\]"),
        (("w_blocks", "w"), "w_blocks is of type uint8, without scales"),
    ],
)
def test_other_bytes_are_refused(packed, tmp_path, names, said):
    write(tmp_path / "model.safetensors", dict(zip(names, packed, strict=True)))
    with pytest.raises(BadInput, match=said):
        open_tensors(tmp_path)
