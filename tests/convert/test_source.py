"""Damaged and foreign directories: one line that names the fault, and nothing half-written."""

import dataclasses
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest

from gshardx.convert.__main__ import main
from gshardx.convert.source import layout_of, open_source, read_config, understood
from gshardx.convert.tensors import INDEX, Planned, open_tensors, write_tensors
from gshardx.errors import BadInput
from gshardx.sharding import MeshConfig, build_mesh
from tests.convert.test_public import PUBLIC


@pytest.fixture
def theirs(tmp_path):
    return shutil.copytree(PUBLIC / "mixtral", tmp_path / "theirs")


def changed(folder, **keys):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | keys))


def rewritten(folder, change):
    """The same tensors but for ``change``, a function of a dict of arrays, in one file."""
    found = open_tensors(folder)
    arrays = {name: found.read(name) for name in found.by_name}
    change(arrays)
    for path in [*folder.glob("*.safetensors"), folder / INDEX]:
        path.unlink()
    planned = [Planned(name, array.dtype, array.shape) for name, array in arrays.items()]
    write_tensors(folder, planned, arrays.__getitem__, 1 << 30, lambda count: None)


def truncated(folder):
    file = folder / "model-00002-of-00003.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def cut_in_its_header(folder):
    file = folder / "model-00002-of-00003.safetensors"
    file.write_bytes(file.read_bytes()[:50])


def add(arrays):
    arrays["model.layers.0.self_attn.q_proj.bias"] = np.zeros(24, np.float32)


def reshape(arrays):
    arrays["model.norm.weight"] = np.ones(17, np.float32)


DAMAGES = {
    "truncated": (truncated, r"model-00002-of-00003.safetensors: [\d,]+ bytes where its header says [\d,]+; truncated"),
    "header": (cut_in_its_header, "model-00002-of-00003.safetensors: not a safetensors file, or one cut off"),
    "file": (lambda f: (f / "model-00003-of-00003.safetensors").unlink(), "model-00003-of-00003.safetensors: missing"),
    "index": (lambda f: (f / INDEX).write_text("{"), f"{INDEX}: not an index"),
    "missing": (
        lambda f: rewritten(f, lambda arrays: arrays.pop("model.layers.1.block_sparse_moe.experts.3.w2.weight")),
        r"no tensor model.layers.1.block_sparse_moe.experts.3.w2.weight \[16, 10\]; config.json asks for it",
    ),
    "extra": (
        lambda f: rewritten(f, add),
        r"tensor model.layers.0.self_attn.q_proj.bias \[24\] has no place",
    ),
    "shape": (lambda f: rewritten(f, reshape), r"model.norm.weight is \[17\], and config.json makes it \[16\]"),
    "integers": (
        lambda f: rewritten(f, lambda arrays: None) or (f / "model.safetensors").write_bytes(
            (f / "model.safetensors").read_bytes().replace(b'"BF16"', b'"I16" ', 1)
        ),
        "is of type I16; only F32, BF16, F16 can be read",
    ),
    "architecture": (lambda f: changed(f, model_type="mixtrel"), "model_type = mixtrel: .*the nearest is mixtral"),
    "window": (
        lambda f: changed(f, model_type="olmoe", sliding_window=4096),
        "sliding_window = 4096 is not supported yet",
    ),
    "layer types": (
        lambda f: changed(f, model_type="gpt_oss", layer_types=["full_attention", "sliding_attention"]),
        r"layer_types = \['full_attention', .* is not supported yet; supported: every nth full_attention",
    ),
    "rope": (
        lambda f: changed(f, rope_scaling={"rope_type": "dynamic", "factor": 4.0}),
        "rope_scaling.rope_type or .* = dynamic is not supported yet; supported: default, linear, llama3, yarn",
    ),
    "half a rope": (
        lambda f: changed(f, rope_scaling={"rope_type": "yarn", "factor": 4.0}),
        "rope_scaling = .*: no original_max_position_embeddings in it",
    ),
    "activation": (lambda f: changed(f, hidden_act="gelu"), "hidden_act = gelu is not supported yet; supported: silu"),
    "dense layers": (
        lambda f: changed(f, model_type="qwen3_moe", moe_intermediate_size=10, mlp_only_layers=[1]),
        r"config.json: mlp_only_layers = \[1\] is not supported yet",
    ),
    "quantised": (lambda f: changed(f, quantization_config={"bits": 4}), "quantization_config = .*not supported yet"),
    "no width": (lambda f: changed(f, hidden_size=None), "config.json: no hidden_size there"),
    "no number": (lambda f: changed(f, rope_theta="much"), "rope_theta = much: can't be read"),
    "heads": (lambda f: changed(f, num_key_value_heads=3), "config.json: model.heads = 4 is not a multiple"),
    "no JSON": (lambda f: (f / "config.json").write_text("{"), "config.json: not JSON"),
    "no tensors": (lambda f: [path.unlink() for path in f.glob("model*")], "neither model.safetensors nor"),
}  # fmt: skip


@pytest.mark.parametrize(("damage", "said"), DAMAGES.values(), ids=DAMAGES)
def test_what_is_wrong_is_one_line_and_nothing_is_written(theirs, tmp_path, damage, said):
    damage(theirs)
    with pytest.raises(BadInput, match=said) as raised:
        main(["--from", str(theirs), "--to", str(tmp_path / "run")])
    assert "\n" not in str(raised.value)
    assert [path.name for path in tmp_path.iterdir()] == ["theirs"]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--shard_size", "0"], "--shard_size 0.0: must be above 0"),
        (["--step", "3"], "--step 3: .*theirs is no run directory"),
        (["--dtype", "float16"], "--dtype float16: run directories have float32 or bfloat16"),
    ],
)
def test_flags_that_do_not_suit(theirs, tmp_path, flags, said):
    with pytest.raises(BadInput, match=said):
        main(["--from", str(theirs), "--to", str(tmp_path / "run"), *flags])


def test_a_directory_of_neither_kind(tmp_path):
    with pytest.raises(BadInput, match=r"neither config.json \(a public model\) nor config.yaml \(a run\) there"):
        main(["--from", str(tmp_path), "--to", str(tmp_path / "run")])


def test_a_target_that_holds_something(theirs):
    with pytest.raises(BadInput, match="not empty"):
        main(["--from", str(theirs), "--to", str(theirs)])
    assert not (theirs / "config.yaml").exists()


def test_a_full_disk_is_said_before_anything_is_written(theirs, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("", (), {"free": 1000}))
    with pytest.raises(BadInput, match=r"the disk is full: .* bytes to write, 1,000 free"):
        main(["--from", str(theirs), "--to", str(tmp_path / "run")])
    assert [path.name for path in tmp_path.iterdir()] == ["theirs"]


def test_rotary_frequencies_of_older_files_are_left_out(theirs):
    before = open_source(theirs).layout(build_mesh(MeshConfig())).pieces
    frequencies = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(3, np.float32)}
    rewritten(theirs, lambda arrays: arrays.update(frequencies))
    assert open_source(theirs).layout(build_mesh(MeshConfig())).pieces == before


MEASURE = """
import resource, sys
from gshardx.convert.__main__ import main
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
main(["--from", sys.argv[1], "--to", sys.argv[2] + "/small"])
before = peak()
main(["--from", sys.argv[3], "--to", sys.argv[2] + "/run"])
main(["--from", sys.argv[2] + "/run", "--to", sys.argv[2] + "/back"])
print(peak() - before)
"""


@pytest.mark.sweep
def test_the_largest_tensor_decides_the_memory(theirs, tmp_path):
    """Half a GB with a tensor of 64 MB: twice that and what is being written, for both directions."""
    large = shutil.copytree(theirs, tmp_path / "large")
    changed(large, vocab_size=1 << 15, hidden_size=512, intermediate_size=4096, num_local_experts=8)
    source = dataclasses.replace(open_source(theirs), config=read_config(large))
    model = understood(source.config, source.family, "config.json")
    pieces = layout_of(source.family, model, 1 << 15, build_mesh(MeshConfig())).pieces
    shapes = {piece.name: piece.shape for piece in pieces}
    for path in [*large.glob("*.safetensors"), large / INDEX]:
        path.unlink()
    planned = [Planned(name, np.dtype(np.float32), shape) for name, shape in shapes.items()]
    assert sum(one.size for one in planned) > 5e8
    write_tensors(large, planned, lambda name: np.ones(shapes[name], np.float32), 1 << 28, lambda count: None)
    command = [sys.executable, "-c", MEASURE, str(theirs), str(tmp_path), str(large)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    grown = int(done.stdout.split()[-1])
    assert grown < 2 * (64 << 20) + (192 << 20)
