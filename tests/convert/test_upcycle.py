"""A dense model with experts computes what it did without."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from gshardx.cli import read_config
from gshardx.config import ModelConfig, MoEConfig
from gshardx.convert.__main__ import main
from gshardx.convert.calibrate import Batch, compare
from gshardx.convert.incoming import convert_in
from gshardx.convert.outgoing import convert_out
from gshardx.convert.rewrite import open_run, write_run
from gshardx.convert.upcycle import Upcycling, of_units, routed_units, router_kernel, upcycled, upcycled_part
from gshardx.errors import BadInput
from gshardx.infer.load import load_run
from gshardx.sharding import MeshConfig
from tests.convert.test_incoming import tuned, with_tokenizer
from tests.convert.test_public import PUBLIC

CASES = {
    "copies": Upcycling(experts=4, top_k=2),
    "split in two": Upcycling(experts=8, top_k=4, split=2),
    "split in five, one copy chosen": Upcycling(experts=10, top_k=5, split=5),
    "shared": Upcycling(experts=4, top_k=1, shared=8),
    "gated shared, split in three": Upcycling(experts=6, top_k=3, split=3, shared=8, gated=True),
    "every other layer": Upcycling(experts=4, top_k=2, split=2, every=2),
}
quick = "gated shared, split in three"
TEXT = [Batch(np.random.default_rng(0).integers(0, 30, (2, 40), np.int32), np.ones((2, 40), bool))]


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    place = tmp_path_factory.mktemp("dense")
    convert_in(with_tokenizer(PUBLIC / "llama", place / "theirs"), place / "run", "float32", lambda line: None)
    return place / "run"


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n == quick else pytest.mark.slow) for n in CASES])
def test_logits_are_those_of_the_dense_model(name, dense, tmp_path):
    how, given = CASES[name], open_run(dense, None)
    model = upcycled(given.config.model, how)
    write_run(given, tmp_path / "run", model, lambda part: upcycled_part(given, model, how, part))
    assert compare(dense, tmp_path / "run", TEXT).difference < 1e-5
    new = load_run(tmp_path / "run", MeshConfig())
    assert (new.step, new.config.model) == (0, model)
    assert model.moe.num_experts == how.experts


@pytest.mark.parametrize(
    ("split", "shared", "copies", "chosen"), [(1, 0, 4, 2), (2, 0, 3, 1), (3, 6, 4, 2), (4, 4, 2, 2)]
)
def test_a_layer_in_numpy(split, shared, copies, chosen):
    """Whatever the router says, as long as it chooses whole copies; in double precision."""
    draw, hidden, width = np.random.default_rng(0), 24, 5
    how = Upcycling(experts=copies * split, top_k=chosen * split, split=split, shared=shared)
    shapes = {"w_up": (width, hidden), "w_gate": (width, hidden), "w_down": (hidden, width), "b_down": (width,)}
    dense = {name: draw.normal(size=shape) for name, shape in shapes.items()}
    x = draw.normal(size=(7, width))

    def ffn(units, scale):
        up, gate, down = (of_units(name, dense[name], units, scale) for name in ("w_up", "w_gate", "w_down"))
        return (np.tanh(x @ gate) * (x @ up)) @ down

    logits = x @ router_kernel(width, how, layer=3).astype(np.float64)
    scores = np.exp(logits)
    best = np.argsort(-np.round(scores, 9), axis=-1, kind="stable")[:, : how.top_k]
    gates = np.zeros_like(scores)
    np.put_along_axis(gates, best, np.take_along_axis(scores, best, -1), -1)
    gates /= gates.sum(-1, keepdims=True)
    out = ffn(slice(shared), 1.0) if shared else 0.0
    for expert in range(how.experts):
        own = ffn(routed_units(hidden, how, expert), split) + of_units("b_down", dense["b_down"], slice(0), split)
        out = out + gates[:, expert, None] * own
    np.testing.assert_allclose(out, ffn(slice(None), 1.0) + dense["b_down"], rtol=1e-5)


def test_routers_differ_between_layers_seeds_and_copies_but_not_within_one():
    how = Upcycling(experts=6, top_k=2, split=2, seed=1)
    one, other = router_kernel(8, how, 0), router_kernel(8, how, 1)
    np.testing.assert_array_equal(one[:, 0::2], one[:, 1::2])
    assert len(np.unique(one, axis=1).T) == 3
    assert not np.isclose(one, other).any()
    assert not np.isclose(one, router_kernel(8, how._replace(seed=2), 0)).any()


@pytest.mark.slow
def test_noise_is_on_experts_alone_and_follows_the_seed(dense, tmp_path, capsys):
    runs = {}
    for name, seed in (("one", 0), ("same", 0), ("other", 1)):
        flags = ["--experts", "2", "--top_k", "1", "--noise", "0.1", "--seed", str(seed)]
        assert main(["upcycle", str(dense), str(tmp_path / name), *flags]) == 0
        runs[name] = load_run(tmp_path / name, MeshConfig()).variables.params
    assert "noise 0.1 with seed 1: not the same function" in capsys.readouterr().out
    jax.tree.map(np.testing.assert_array_equal, runs["one"], runs["same"])
    before = load_run(dense, MeshConfig()).variables.params["stack"]["units"]["sparse"]
    after, other = (runs[name]["stack"]["units"]["sparse"] for name in ("one", "other"))
    jax.tree.map(np.testing.assert_array_equal, before["attention"], after["attention"])
    moved = np.asarray(after["feed_forward"]["experts"]["w_up"] - before["feed_forward"]["experts"]["w_up"])
    assert 0.08 < moved.std() / np.asarray(before["feed_forward"]["experts"]["w_up"]).std() < 0.12
    assert not np.isclose(moved[:, 0], moved[:, 1]).any()
    assert not np.isclose(after["feed_forward"]["experts"]["w_up"], other["feed_forward"]["experts"]["w_up"]).all()


@pytest.mark.slow
def test_the_command_says_the_loss(dense, tmp_path, capsys):
    (tmp_path / "text.txt").write_text("to be, or not to be\n" * 20)
    command = ["upcycle", str(dense), str(tmp_path / "run"), "--experts", "4", "--top_k", "2", "--data"]
    assert main([*command, str(tmp_path / "text.txt")]) == 0
    said = capsys.readouterr().out
    assert "2 layers: 4 experts of 20 hidden units each, 2 a token" in said
    assert "logits differ by at most" in said
    assert read_config(tmp_path / "run" / "config.yaml").data.tokenizer == str(tmp_path / "run" / "tokenizer.json")


DENSE = ModelConfig(moe=MoEConfig(num_experts=1, top_k=1, every=1, router="top_k", hidden=24), hidden=24)


@pytest.mark.parametrize(
    ("model", "how", "said"),
    [
        (ModelConfig(), Upcycling(4, 2), "num_experts = 8: not dense"),
        (DENSE, Upcycling(4, 3, split=2), "use --experts 4 --top_k 4"),
        (DENSE, Upcycling(10, 5, split=5), "model.moe.hidden = 24 less the shared units must be a multiple"),
        (DENSE, Upcycling(4, 2, shared=24), "and above 0"),
        (DENSE, Upcycling(4, 8), "model.moe.top_k = 8 is more than"),
        (DENSE, Upcycling(4, 2, every=3), "model.layers = 4 is not a multiple of model.moe.every = 3"),
        (
            dataclasses.replace(DENSE, moe=dataclasses.replace(DENSE.moe, router_options={"scale": 2.0})),
            Upcycling(4, 2),
            "the one expert's gate is not 1",
        ),
        (
            dataclasses.replace(DENSE, moe=dataclasses.replace(DENSE.moe, shared_hidden=8)),
            Upcycling(4, 2, shared=8),
            "model.moe.shared_hidden = 8 already",
        ),
    ],
)
def test_what_can_not_be_is_one_line(model, how, said):
    with pytest.raises(BadInput, match=said):
        upcycled(model, how)


def test_a_split_model_goes_out_as_a_public_one(tmp_path):
    convert_in(PUBLIC / "qwen3", tmp_path / "dense", None, lambda line: None)
    flags = ["--experts", "8", "--top_k", "4", "--split", "2"]
    assert main(["upcycle", str(tmp_path / "dense"), str(tmp_path / "run"), *flags]) == 0
    said = []
    convert_out(tmp_path / "run", tmp_path / "back", say=said.append)
    assert "(qwen3_moe)" in said[-1]
    arrays = open_run(tmp_path / "run", None).dtypes
    assert {arrays[name] for name in arrays if "experts" in name} == {"bfloat16"}


@pytest.mark.slow
def test_training_starts_from_it(dense, tmp_path, capsys):
    text = tmp_path / "text.jsonl"
    text.write_text("\n".join(json.dumps({"text": f"to be, or not to be {'a' * n}"}) for n in range(60)))
    how = ["--experts", "4", "--top_k", "2", "--split", "2"]
    assert main(["upcycle", str(dense), str(tmp_path / "run"), *how]) == 0
    tuned(tmp_path, text, tmp_path / "tuned", learning_rate=1e-3)
    assert f"starting from the weights in {tmp_path / 'tuned' / 'checkpoints' / '0'}" in capsys.readouterr().out
    kernel = load_run(tmp_path / "tuned", MeshConfig()).variables.params
    kernel = np.asarray(kernel["stack"]["units"]["sparse"]["feed_forward"]["experts"]["w_up"])
    assert not np.isclose(kernel[:, 0], kernel[:, 2]).all(), "copies part"
