"""Weights of eight bits: against their definition bit by bit, in files, and as DeepSeek's own."""

import json
import math

import jax.numpy as jnp
import numpy as np
import pytest

from gshardx.convert.fp8 import decoded
from gshardx.convert.incoming import convert_in
from gshardx.convert.outgoing import convert_out
from gshardx.convert.tensors import open_tensors
from gshardx.errors import BadInput
from tests.convert.packed_files import write
from tests.convert.test_public import PUBLIC


def value(bits):
    """Of sign, four bits of exponent with bias 7, and three of mantissa (OCP 8-bit Floating Point, 1.0, table 1)."""
    sign, exponent, mantissa = -1 if bits >> 7 else 1, bits >> 3 & 15, bits & 7
    if exponent == 15 and mantissa == 7:
        return math.nan
    return sign * (mantissa / 8 * 2.0**-6 if exponent == 0 else 2.0 ** (exponent - 7) * (1 + mantissa / 8))


@pytest.fixture
def packed():
    """Blocks that are not whole at both ends; every code is there."""
    draw = np.random.default_rng(0)
    codes = draw.permutation(np.arange(130 * 260) % 256).astype(np.uint8).reshape(130, 260)
    return codes.view(jnp.float8_e4m3fn), draw.uniform(1e-4, 2, (2, 3)).astype(np.float32)


def test_each_value_is_the_rounded_product(packed):
    numbers, scales = packed
    found = decoded(numbers, scales)
    codes = numbers.view(np.uint8)
    expected = np.empty(codes.shape, np.float32)
    for row, column in np.ndindex(*codes.shape):
        expected[row, column] = np.float32(value(int(codes[row, column]))) * scales[row // 128, column // 128]
    assert found.dtype == jnp.bfloat16
    np.testing.assert_array_equal(found.astype(np.float32), expected.astype(jnp.bfloat16).astype(np.float32))


def test_numbers_and_scales_are_one_tensor_of_a_file(packed, tmp_path):
    write(tmp_path / "model.safetensors", {"w": packed[0], "w_scale_inv": packed[1]})
    tensors = open_tensors(tmp_path)
    about = tensors.by_name["w"]
    assert (list(tensors.by_name), about.shape, about.dtype.name) == (["w"], (130, 260), "bfloat16")
    assert tensors.read("w").tobytes() == decoded(*packed).tobytes()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda w, s: {"w": w}, "w is of type float8_e4m3fn, without scales that are known here"),
        (lambda w, s: {"w": w, "w_scale": s}, "w is of type float8_e4m3fn, without scales that are known here"),
        (lambda w, s: {"w": w, "w_scale_inv": s[:1]}, r"w_scale_inv \[1, 3\] does not suit w \[130, 260\]"),
    ],
)
def test_other_scales_are_refused(packed, tmp_path, change, said):
    write(tmp_path / "model.safetensors", change(*packed))
    with pytest.raises(BadInput, match=said):
        open_tensors(tmp_path)


def test_a_quantised_model_comes_in_and_goes_out_as_bfloat16(tmp_path):
    """As DeepSeek-V3's own files: all matrices of layers but the routers' are packed."""
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    about = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
    config = json.loads((PUBLIC / "deepseek_v3" / "config.json").read_text()) | {"dtype": "bfloat16"}
    (theirs / "config.json").write_text(json.dumps(config | {"quantization_config": about}))
    tensors, expected = open_tensors(PUBLIC / "deepseek_v3"), {}
    files = {}
    for name in tensors.by_name:
        plain = tensors.read(name)
        if "proj" in name and plain.ndim == 2:
            numbers, scales = (plain * 64).astype(jnp.float8_e4m3fn), np.full((1, 1), 1 / 64, np.float32)
            files |= {name: numbers, f"{name}_scale_inv": scales}
            expected[name] = decoded(numbers, scales)
        else:
            own = np.float32 if "bias" in name else jnp.bfloat16
            files[name] = expected[name] = plain.astype(own)
    write(theirs / "model.safetensors", files)
    said = []
    convert_in(theirs, tmp_path / "run", None, said.append)
    convert_out(tmp_path / "run", tmp_path / "back", say=said.append)
    assert "it came quantised, and goes out as bfloat16, without quantization_config" in said[-2]
    back = open_tensors(tmp_path / "back")
    assert back.by_name.keys() == expected.keys()
    for name, plain in expected.items():
        np.testing.assert_array_equal(back.read(name), plain, err_msg=name)


def test_blocks_of_another_size_are_refused(tmp_path):
    config = json.loads((PUBLIC / "deepseek_v3" / "config.json").read_text())
    about = {"quant_method": "fp8", "weight_block_size": [64, 64]}
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": about}))
    with pytest.raises(BadInput, match=r"weight_block_size = \[64, 64\] is not supported yet; supported: \[128, 128\]"):
        convert_in(tmp_path, tmp_path / "run", None)
