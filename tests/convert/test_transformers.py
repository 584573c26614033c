"""Against transformers itself, where it is installed: each option of each family, read, run and written back."""

import filecmp

import numpy as np
import pytest

from gshardx.convert.incoming import convert_in
from gshardx.convert.model import Model
from gshardx.convert.outgoing import convert_out
from gshardx.sharding import MeshConfig
from tests.convert.publics import CASES, chosen, make, tokens

transformers = pytest.importorskip("transformers")
torch = pytest.importorskip("torch")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=CASES, ids=CASES)
def public(request, tmp_path_factory):
    """What it was made of, the model, and its folder; the ones with odd heads in several files."""
    folder = tmp_path_factory.mktemp("public")
    model_type, options = CASES[request.param]
    model = make(model_type, options)
    model.save_pretrained(folder, max_shard_size="20KB" if "odd" in request.param else "5GB")
    return options, model, folder


def mesh_of(options):
    """Eight devices; heads in three don't divide over tensor, nor one expert over expert."""
    tensor = 1 if options.get("num_attention_heads") == 3 else 2
    routed = "num_experts_per_tok" in options
    return MeshConfig(data=2, tensor=tensor, **{"expert" if routed else "fsdp": 4 // tensor})


@pytest.mark.parametrize("devices", [1, 8])
def test_logits_and_experts(public, devices):
    options, model, folder = public
    given = tokens(rows=8)
    logits, experts = chosen(model, given)
    ours, metrics = Model.from_pretrained(folder, MeshConfig() if devices == 1 else mesh_of(options))(given)
    np.testing.assert_allclose(np.asarray(ours), logits, atol=1e-4 * np.abs(logits).max(), rtol=0)
    if experts is not None:
        np.testing.assert_array_equal(np.sort(np.asarray(metrics.experts), axis=-1), experts)


def test_the_way_back(public, tmp_path):
    _, model, folder = public
    convert_in(folder, tmp_path / "run", None, lambda line: None)
    convert_out(tmp_path / "run", tmp_path / "back", say=lambda line: None)
    files = sorted(path.name for path in folder.iterdir())
    assert filecmp.cmpfiles(folder, tmp_path / "back", files, shallow=False) == (files, [], [])
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, again.state_dict()[name]), name


@pytest.mark.parametrize("name", ["deepseek_v3", "glm4_moe"])
def test_a_layer_after_the_last_comes_back_and_changes_nothing(name, tmp_path):
    """As the hub has DeepSeek-V3 and GLM-4.5: one that predicts the token after the next."""
    from safetensors.torch import load_file, save_file

    model = make(*CASES[name])
    model.save_pretrained(tmp_path / "theirs")
    file = tmp_path / "theirs" / "model.safetensors"
    held, last = load_file(file), model.config.num_hidden_layers
    held |= {
        f"model.layers.{last}.eh_proj.weight": torch.randn(24, 48),
        f"model.layers.{last}.enorm.weight": torch.randn(24),
    }
    save_file(held, file, metadata={"format": "pt"})
    convert_in(tmp_path / "theirs", tmp_path / "run", "bfloat16", lambda line: None)
    convert_out(tmp_path / "run", tmp_path / "half", say=lambda line: None)
    read = load_file(tmp_path / "half" / "model.safetensors")
    for name, weight in held.items():
        kept = f"layers.{last}." in name or name.endswith("correction_bias")
        assert torch.equal(read[name], weight if kept else weight.bfloat16()), name
    ours = Model.from_pretrained(tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "back")
    assert filecmp.cmp(file, tmp_path / "back" / "model.safetensors", shallow=False)
    ours.save_pretrained(tmp_path / "parts", largest=20_000)
    convert_in(tmp_path / "parts", tmp_path / "again", None, lambda line: None)
    convert_out(tmp_path / "again", tmp_path / "parts back", say=lambda line: None)
    files = sorted(path.name for path in (tmp_path / "parts").iterdir())
    assert len(files) > 4
    assert filecmp.cmpfiles(tmp_path / "parts", tmp_path / "parts back", files, shallow=False) == (files, [], [])
    given = tokens()
    np.testing.assert_allclose(np.asarray(ours(given)[0]), chosen(model, given)[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "name",
    [
        "mixtral", "qwen2_moe", "granitemoe, scaled, biases, tied", "qwen3", "deepseek_v2, groups, yarn, biases",
        "deepseek_v3, whole queries, halves, odd heads, tied",
        "phimoe, all biases, longrope", "phimoe, windows, odd heads, tied",
        "glm4_moe, norms, biases, groups, stretched, two shared",
        "llama4_text, half dense, no norm, not tuned, biases, llama3",
        "llama4_text, odd heads, tied, all turned, two experts", "gpt_oss, all sliding, odd heads, tied",
    ],
)  # fmt: skip
def test_a_config_written_by_us_is_read_as_meant(name, tmp_path):
    """Without the files that the weights came with, as for a model trained here."""
    import shutil

    model_type, options = CASES[name]
    model = make(model_type, options)
    model.save_pretrained(tmp_path / "theirs")
    convert_in(tmp_path / "theirs", tmp_path / "run", None, lambda line: None)
    shutil.rmtree(tmp_path / "run" / "huggingface")
    convert_out(tmp_path / "run", tmp_path / "back", say=lambda line: None)
    eager = {"experts_implementation": "eager"}  # torch's grouped products want widths that are multiples of 4
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back", **eager).eval()
    given = tokens()
    theirs = chosen(model, given)[0]
    np.testing.assert_allclose(chosen(again, given)[0], theirs, atol=1e-5 * max(1.0, np.abs(theirs).max()))
