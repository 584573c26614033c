"""A dense ReLU model as experts that are parts of it: the same sum, and units that fire together lie together."""

import dataclasses
import json

import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

from gshardx.config import ModelConfig, MoEConfig
from gshardx.convert.__main__ import main
from gshardx.convert.calibrate import Batch, compare
from gshardx.convert.incoming import convert_in
from gshardx.convert.moefy import (
    Moefying,
    Network,
    assigned,
    balanced_clusters,
    fitted_router,
    masses,
    moefied,
    random_split,
    split_network,
)
from gshardx.convert.outgoing import convert_out
from gshardx.convert.recall import layer_recall
from gshardx.convert.rewrite import open_run, write_run
from gshardx.convert.surgery import duplicated
from gshardx.errors import BadInput
from gshardx.infer.load import load_run
from gshardx.sharding import MeshConfig
from tests.convert.test_incoming import with_tokenizer
from tests.convert.test_public import PUBLIC

DENSE = ModelConfig(
    activation="relu", moe=MoEConfig(num_experts=1, top_k=1, every=1, router="top_k", hidden=24), hidden=24
)
TEXT = [Batch(np.random.default_rng(0).integers(0, 30, (2, 40), np.int32), np.ones((2, 40), bool))]


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """Llama's weights without gates, with ReLU and biases."""
    place = tmp_path_factory.mktemp("dense")
    convert_in(with_tokenizer(PUBLIC / "llama", place / "theirs"), place / "gated", "float32", lambda line: None)
    given, draw = open_run(place / "gated", None), np.random.default_rng(0)
    moe = dataclasses.replace(given.config.model.moe, biases=True)

    def value(part):
        if part.layer is None:
            return given.outside(part)
        last = part.rest.rpartition(".")[2]
        if last in ("b_up", "b_down"):
            size = moe.hidden if last == "b_up" else given.config.model.width
            return (0.2 * draw.standard_normal(size)).astype(np.float32)
        return given.in_layer(part.layer, part.rest, part.expert)

    model = dataclasses.replace(given.config.model, activation="relu", moe=moe)
    write_run(given, place / "run", model, value)
    (place / "text.txt").write_text("to be, or not to be, that is the question\n" * 40)
    return place / "run"


@pytest.mark.slow
def test_with_all_experts_the_logits_are_those_of_the_dense_model(dense, tmp_path, capsys):
    flags = ["--experts", "4", "--top_k", "4", "--data", str(dense.parent / "text.txt"), "--tokens", "400"]
    assert main(["moefy", str(dense), str(tmp_path / "run"), *flags, "--json", str(tmp_path / "recall.json")]) == 0
    assert compare(dense, tmp_path / "run", TEXT).difference < 1e-5
    said = capsys.readouterr().out
    assert "layer 1: share held by k experts" in said
    assert "routers fitted to 320 tokens, recall on 80 others; the same function" in said
    told = json.loads((tmp_path / "recall.json").read_text())
    assert (told["experts"], told["by"], [one["layer"] for one in told["layers"]]) == (4, "weights", [0, 1])
    for layer in told["layers"]:
        for kind in ("clusters_routed", "clusters_best", "random_routed", "random_best"):
            assert layer[kind]["mass"][-1] == pytest.approx(1.0, abs=1e-6)
            assert layer[kind]["output"][-1] == pytest.approx(1.0, abs=1e-6)
            assert layer[kind]["mass"] == sorted(layer[kind]["mass"])


@pytest.mark.slow
def test_with_fewer_experts_a_token_logits_change_and_biases_are_added_once(dense, tmp_path, capsys):
    """Of five experts four: whichever they are, their biases are the layer's."""
    flags = ["--experts", "5", "--top_k", "4", "--by", "activations", "--data", str(dense.parent / "text.txt")]
    assert main(["moefy", str(dense), str(tmp_path / "run"), *flags]) == 0
    assert "; not the same function" in capsys.readouterr().out
    new = load_run(tmp_path / "run", MeshConfig())
    assert new.config.model.moe.router_options == {"softmax": "none", "bias": True}
    assert compare(dense, tmp_path / "run", TEXT).difference > 1e-4
    before, after = (open_run(run, None) for run in (dense, tmp_path / "run"))
    for layer in range(2):
        biases = [after.in_layer(layer, "feed_forward.experts.b_down", expert) for expert in range(4)]
        np.testing.assert_allclose(sum(biases), before.in_layer(layer, "feed_forward.experts.b_down", 0), rtol=1e-6)
    with pytest.raises(BadInput, match="no architecture here has such a model"):
        convert_out(tmp_path / "run", tmp_path / "back")


def planted(groups=6, size=4, width=12, seed=0):
    """Units around directions that are far apart, shuffled; inputs along one or two of them."""
    draw = np.random.default_rng(seed)
    directions = np.linalg.qr(draw.normal(size=(width, width)))[0][:groups]
    group = draw.permutation(np.repeat(np.arange(groups), size))
    w_up = (directions[group] + 0.1 * draw.normal(size=(len(group), width))).T
    w_down = draw.normal(size=(len(group), width))
    network = Network(w_up.astype(np.float32), None, w_down.astype(np.float32))
    picks = np.stack([draw.permutation(groups)[:2] for _ in range(300)])
    x = directions[picks[:, 0]] * 3 + directions[picks[:, 1]] + 0.05 * draw.normal(size=(300, width))
    return network, group, x.astype(np.float32)


@pytest.mark.parametrize("by", ["weights", "activations"])
def test_planted_clusters_are_found_and_hold_more_than_a_random_split(by):
    network, group, x = planted()
    how = Moefying(experts=6, top_k=2, by=by)
    clusters, random = (make(network, x[:200], how, 0) for make in (split_network, random_split))
    assert sorted(map(tuple, clusters.units)) == sorted(tuple(np.flatnonzero(group == g)) for g in range(6))
    assert sorted(random.units.reshape(-1)) == list(range(24))
    found = layer_recall(network, clusters, random, x[200:])
    assert found.clusters_routed.mass[1] > 0.85 > found.random_best.mass[1] + 0.1
    assert found.clusters_routed.output[1] > found.random_best.output[1] + 0.2
    for routed, best in ((found.clusters_routed, found.clusters_best), (found.random_routed, found.random_best)):
        assert (routed.mass <= best.mass + 1e-6).all()


def slow_recall(network, units, x, scores):
    """Token by token, expert by expert; of shares and lacking outputs."""
    e = len(units)
    mass, lacks, all_mass, whole = np.zeros(e), np.zeros(e), 0.0, 0.0
    for n in range(len(x)):
        hidden = [max(0.0, float(x[n].astype(np.float64) @ network.w_up[:, j])) for j in range(network.w_up.shape[1])]
        dense = sum(hidden[j] * network.w_down[j].astype(np.float64) for j in range(len(hidden)))
        order = sorted(range(e), key=lambda i, n=n: -scores[n][i])
        whole += dense @ dense
        all_mass += sum(hidden)
        for k in range(1, e + 1):
            held = [j for i in order[:k] for j in units[i]]
            mass[k - 1] += sum(hidden[j] for j in held)
            part = dense - sum(hidden[j] * network.w_down[j].astype(np.float64) for j in held)
            lacks[k - 1] += part @ part
    return mass / all_mass, 1 - np.sqrt(lacks / whole)


def test_recall_equals_its_slow_twin(monkeypatch):
    network, _, x = planted(groups=4, size=3, width=6, seed=1)
    how, x = Moefying(experts=3, top_k=1), x[:60]
    clusters, random = (make(network, x[:40], how, 2) for make in (split_network, random_split))
    monkeypatch.setattr("gshardx.convert.recall._VALUES", 7 * 3 * 6)  # several passes
    found = layer_recall(network, clusters, random, x[40:])
    for split, routed, best in ((clusters, *found[:2]), (random, *found[2:])):
        sums = masses(network, split.units, x[40:])
        for got, scores in ((routed, x[40:] @ split.kernel + split.bias), (best, sums)):
            mass, output = slow_recall(network, split.units, x[40:], scores)
            np.testing.assert_allclose(got.mass, mass, atol=1e-5)
            np.testing.assert_allclose(got.output, output, atol=1e-5)


def test_a_router_finds_what_is_linear():
    draw = np.random.default_rng(0)
    x, kernel, bias = draw.normal(size=(500, 6)), draw.normal(size=(6, 3)), draw.normal(size=3)
    found = fitted_router(x, x @ kernel + bias)
    np.testing.assert_allclose(found[0], kernel, atol=5e-3)
    np.testing.assert_allclose(found[1], bias, atol=5e-3)


@pytest.mark.parametrize("seed", range(3))
def test_clusters_are_of_one_size_and_near_the_best_assignment(seed):
    draw = np.random.default_rng(seed)
    distances = draw.random((24, 4))
    labels = assigned(distances)
    np.testing.assert_array_equal(np.bincount(labels), [6] * 4)
    rows, columns = linear_sum_assignment(np.repeat(distances, 6, axis=1))
    best = np.repeat(distances, 6, axis=1)[rows, columns].sum()
    assert best <= distances[np.arange(24), labels].sum() < 1.25 * best


def test_units_that_are_all_equal_are_dealt_out():
    units = balanced_clusters(np.ones((12, 3), np.float32), 4, np.random.default_rng(0))
    assert units.shape == (4, 3)
    assert sorted(units.reshape(-1)) == list(range(12))


def test_copies_of_experts_that_weigh_one_are_scaled():
    model, _ = duplicated(moefied(DENSE, Moefying(4, 2)), 2)
    assert model.moe.router_options == {"softmax": "none", "bias": True, "scale": 0.5}


@pytest.mark.parametrize(
    ("model", "how", "said"),
    [
        (dataclasses.replace(DENSE, activation="swiglu"), Moefying(4, 2), "hardly ever 0, .* MoEfication is for relu"),
        (DENSE, Moefying(5, 2), "--experts 5: does not divide model.moe.hidden = 24; use 4"),
        (DENSE, Moefying(4, 5), "model.moe.top_k = 5 is more than"),
        (ModelConfig(activation="relu"), Moefying(4, 2), "num_experts = 8: not dense"),
    ],
)
def test_what_can_not_be_is_one_line(model, how, said):
    with pytest.raises(BadInput, match=said):
        moefied(model, how)


def test_without_text_it_is_refused(dense, tmp_path):
    with pytest.raises(BadInput, match="moefy needs --data PATH"):
        main(["moefy", str(dense), str(tmp_path / "run"), "--experts", "4", "--top_k", "2"])
    assert list(tmp_path.iterdir()) == []
