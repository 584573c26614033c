"""--verify: numbers that are right, and damage that is found where it is."""

import json
import shutil

import numpy as np
import pytest
from scipy.special import rel_entr, softmax

from gshardx.cli import run_command
from gshardx.convert.__main__ import main
from gshardx.convert.incoming import convert_in
from gshardx.convert.tensors import Planned, open_tensors, read_index, write_tensors
from gshardx.convert.traces import Trace, trace_theirs
from gshardx.convert.verify import compare, tokens_for
from gshardx.errors import BadInput
from tests.convert.test_incoming import LETTERS, with_tokenizer
from tests.convert.test_public import PUBLIC


def trace(**changes):
    draw = np.random.default_rng(0)
    hidden = [draw.normal(size=(2, 5, 3)).astype(np.float32) for _ in range(4)]
    experts = {layer: np.sort(draw.permuted(np.tile(np.arange(6), (2, 5, 1)), axis=-1)[..., :2]) for layer in (0, 2)}
    return Trace(draw.normal(size=(2, 5, 7)).astype(np.float32), hidden, experts)._replace(**changes)


def test_the_same_is_the_same():
    verdict = compare(trace(), trace(), "drawn")
    assert verdict.good
    assert (verdict.difference, verdict.kl_max, verdict.top_1, verdict.tokens) == (0, 0, 1, 10)
    assert [layer.routing for layer in verdict.layers] == [1, None, 1]


def test_the_numbers_are_those_of_their_definitions():
    theirs, ours = trace(), trace(logits=trace().logits[::-1] * 2)
    verdict = compare(theirs, ours, "drawn")
    nats = rel_entr(*(softmax(one.logits.astype(np.float64), -1) for one in (theirs, ours))).sum(-1)
    np.testing.assert_allclose([verdict.kl_mean, verdict.kl_max], [nats.mean(), nats.max()])
    difference = np.abs(theirs.logits - ours.logits).max()
    np.testing.assert_allclose(verdict.relative, difference / np.abs(theirs.logits).max(), rtol=1e-6)
    assert verdict.top_1 == np.mean(theirs.logits.argmax(-1) == ours.logits.argmax(-1)) < 1
    assert (verdict.good, verdict.first_that_differs) == (False, "what follows the layers")


@pytest.mark.parametrize(("at", "named"), [(0, "the embedding"), (1, "layer 0"), (3, "layer 2")])
def test_the_first_layer_that_differs_is_named(at, named):
    hidden = [one + (number >= at) for number, one in enumerate(trace().hidden)]
    assert compare(trace(), trace(hidden=hidden, logits=trace().logits + 1), "drawn").first_that_differs == named


def test_one_token_of_another_expert_is_enough():
    experts = {layer: own.copy() for layer, own in trace().experts.items()}
    experts[2][1, 3] = [0, 7]
    verdict = compare(trace(), trace(experts=experts), "drawn")
    assert (verdict.good, verdict.first_that_differs, verdict.layers[2].routing) == (False, "layer 2", 0.9)


def test_what_is_no_number_is_not_the_same():
    verdict = compare(trace(), trace(logits=trace().logits * np.nan), "drawn")
    assert not verdict.good
    assert json.loads(json.dumps(verdict.as_json(), allow_nan=False))["relative"] is None


def test_models_of_different_depth_are_not_compared():
    with pytest.raises(BadInput, match=r"two different models: .*3 layers, experts in \[0, 2\]; here are .*2 layers"):
        compare(trace(), trace(hidden=trace().hidden[1:]), "drawn")


def test_tokens_are_of_text_where_there_is_a_tokenizer(tmp_path):
    folder = with_tokenizer(PUBLIC / "mixtral", tmp_path / "theirs")
    text, of = tokens_for(folder, 48, 300)
    assert (text.shape, of, len(np.unique(text)) > 15) == ((2, 128), "of text", True)
    drawn, of = tokens_for(PUBLIC / "mixtral", 48, 40)
    assert (drawn.shape, of) == ((1, 40), "random, as there is no tokenizer")
    np.testing.assert_array_equal(drawn, tokens_for(PUBLIC / "mixtral", 48, 40)[0])
    assert tokens_for(folder, len(LETTERS) // 2, 40)[1] != "of text", "ids that the model lacks"


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ([], "--to is missing"),
        (["--verify", "--tokens", "0"], "--tokens 0: must be 1 or more"),
        (["--verify", "--dtype", "bfloat16"], "--verify alone writes nothing"),
        (["--verify", "--json", "no/such/folder/file"], "--json no/such/folder/file: no directory no/such/folder"),
        (["--to", "x", "--json", "y"], "--json y: is for the numbers of --verify"),
    ],
)
def test_flags_that_do_not_go_together(flags, said):
    with pytest.raises(BadInput, match=said):
        main(["--from", str(PUBLIC / "mixtral"), *flags])


def test_without_transformers_a_line_says_what_to_install(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    monkeypatch.setattr("sys.argv", ["convert", "--from", str(PUBLIC / "mixtral"), "--to", str(tmp_path), "--verify"])
    with pytest.raises(SystemExit, match="2"):
        run_command(main)
    assert "pip install 'gshardx[hf]' torch" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


@pytest.mark.slow
def test_choices_are_found_in_routers_that_return_scores_of_all_experts():
    transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
    sizes = {"hidden_size": 16, "intermediate_size": 20, "intermediate_size_mlp": 24, "head_dim": 8, "vocab_size": 48}
    counts = {"num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4}
    options = {"num_experts_per_tok": 2, "interleave_moe_layer_step": 2, "pad_token_id": 0}
    config = transformers.Llama4TextConfig(**sizes, **counts, **options, attn_implementation="eager")
    model = transformers.Llama4ForCausalLM(config).float().eval()
    given, logits = np.arange(18, dtype=np.int32).reshape(2, 9), []
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(std=0.3)
    model.model.layers[3].feed_forward.router.register_forward_hook(lambda module, x, out: logits.append(out[1]))
    found = trace_theirs(model, given)
    assert (list(found.experts), len(found.hidden)) == ([1, 3], 5)
    best = logits[0].topk(2, dim=-1).indices.numpy().reshape(2, 9, 2)
    np.testing.assert_array_equal(found.experts[3], np.sort(best, axis=-1))


def damaged(target, change):
    """A run of the tiny Mixtral, some of whose tensors were changed on the way: ``change`` is given them by name."""
    source, folder = PUBLIC / "mixtral", target.with_name("damaged")
    tensors, places = open_tensors(source), read_index(source)
    values = {name: tensors.read(name) for name in places}
    values |= change(values)
    shutil.copytree(source, folder)
    write_tensors(folder, [Planned(name, one.dtype, one.shape) for name, one in values.items()], values.get, places,
                  lambda size: None)  # fmt: skip
    convert_in(folder, target, None, lambda line: None)


EXPERT = "model.layers.1.block_sparse_moe.experts.{}.w2.weight"
ROUTER = "model.layers.0.block_sparse_moe.gate.weight"


def swapped(values):
    return {EXPERT.format(0): values[EXPERT.format(1)], EXPERT.format(1): values[EXPERT.format(0)]}


def perturbed(values):
    return {ROUTER: values[ROUTER] * np.array([[1], [1], [1.5], [1]], values[ROUTER].dtype)}


@pytest.mark.slow
@pytest.mark.parametrize(("change", "layer", "routing"), [(swapped, 1, 1.0), (perturbed, 0, 0.99)])
def test_damage_is_found_in_its_layer(change, layer, routing, tmp_path, capsys):
    pytest.importorskip("transformers")
    damaged(tmp_path / "run", change)
    flags = ["--from", str(PUBLIC / "mixtral"), "--to", str(tmp_path / "run"), "--verify", "--tokens", "96"]
    assert main([*flags, "--json", str(tmp_path / "numbers.json")]) == 1
    assert f"NOT the same model: the first to differ is layer {layer}\n" in capsys.readouterr().out
    numbers = json.loads((tmp_path / "numbers.json").read_text())
    assert (numbers["good"], numbers["first_that_differs"]) == (False, f"layer {layer}")
    assert next(one["number"] for one in numbers["layers"] if one["difference"] > 1e-4) == layer
    assert numbers["layers"][layer]["routing"] <= routing
    assert numbers["kl_mean"] > 1e-5


@pytest.mark.slow
@pytest.mark.parametrize(("name", "layers"), [("glm4_moe", [1, 2]), ("llama4_text", [1, 3])])
def test_experts_are_named_in_the_layers_that_have_them(name, layers, tmp_path):
    pytest.importorskip("transformers")
    flags = ["--from", str(PUBLIC / name), "--verify", "--tokens", "32", "--json", str(tmp_path / "numbers.json")]
    assert main(flags) == 0
    found = json.loads((tmp_path / "numbers.json").read_text())["layers"]
    assert {one["number"]: one["routing"] for one in found if one["routing"] is not None} == dict.fromkeys(layers, 1.0)


@pytest.mark.slow
def test_a_conversion_is_verified_in_each_direction(tmp_path, capsys):
    pytest.importorskip("transformers")
    theirs, run, back = with_tokenizer(PUBLIC / "qwen3_moe", tmp_path / "theirs"), tmp_path / "run", tmp_path / "back"
    for flags in (["--from", theirs, "--to", run], ["--from", run, "--to", back], ["--from", run], ["--from", back]):
        assert main([*map(str, flags), "--verify", "--tokens", "64"]) == 0
        said = capsys.readouterr().out
        assert "64 tokens, of text" in said
        assert "the same model" in said
