"""The experts that a layer's output can best do without."""

import itertools

import jax
import numpy as np
import pytest

from gshardx.convert import reconstruct
from gshardx.convert.__main__ import main
from gshardx.convert.incoming import convert_in
from gshardx.convert.reconstruct import best_set, kept_by_reconstruction
from gshardx.errors import BadInput
from gshardx.infer.load import load_run
from gshardx.sharding import MeshConfig
from tests.convert.test_incoming import with_tokenizer
from tests.convert.test_public import PUBLIC
from tests.convert.test_upcycle import TEXT


def test_all_sets_are_looked_at_where_they_are_few_and_else_one_expert_goes_at_a_time(monkeypatch):
    errors = {one: number for number, one in enumerate(itertools.combinations(range(5), 2))}
    assert best_set(5, 2, lambda one: -errors[one]) == (3, 4)
    monkeypatch.setattr(reconstruct, "EXHAUSTIVE", 1)
    weights = np.array([3.0, 1.0, 5.0, 2.0, 4.0])
    asked = []
    assert best_set(5, 2, lambda one: asked.append(one) or -weights[list(one)].sum()) == (2, 4)
    assert len(asked) == 5 + 4 + 3


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    place = tmp_path_factory.mktemp("run")
    convert_in(with_tokenizer(PUBLIC / "mixtral", place / "theirs"), place / "run", "float32", lambda line: None)
    return place / "run"


def in_numpy(moe, x, experts):
    """A layer that chooses two of ``experts``, in double precision."""
    scores = np.exp(x @ moe["router"]["kernel"][:, experts])
    scores[scores < np.sort(scores, axis=-1)[:, -2:-1]] = 0.0
    gates, out = scores / scores.sum(-1, keepdims=True), np.zeros_like(x)
    for number, expert in enumerate(experts):
        up, gate, down = (moe["experts"][name][expert] for name in ("w_up", "w_gate", "w_down"))
        hidden = x @ gate
        out += gates[:, number, None] * ((hidden / (1 + np.exp(-hidden)) * (x @ up)) @ down)
    return out


@pytest.mark.slow
def test_a_layer_keeps_the_set_with_the_least_change_and_says_it_as_numpy_does(run, monkeypatch):
    seen, original = [], reconstruct.layer_inputs
    monkeypatch.setattr(reconstruct, "layer_inputs", lambda *given: seen.extend(original(*given)) or seen)
    loaded = load_run(run, MeshConfig())
    count = loaded.config.model.moe.num_experts
    found = kept_by_reconstruction(loaded, TEXT, count - 1)
    params = loaded.variables.params["stack"]["units"]["sparse"]["feed_forward"]
    for layer, (stay, change) in enumerate(found):
        moe = jax.tree.map(lambda leaf, layer=layer: np.asarray(leaf[layer], np.float64), params)
        x = np.asarray(seen[layer], np.float64)
        whole = in_numpy(moe, x, list(range(count)))
        changes = {
            one: np.linalg.norm(in_numpy(moe, x, list(one)) - whole) / np.linalg.norm(whole)
            for one in itertools.combinations(range(count), count - 1)
        }
        assert stay == min(changes, key=changes.get)
        assert np.isclose(change, changes[stay], rtol=1e-4), (change, changes)


@pytest.mark.slow
def test_the_command(run, tmp_path, capsys):
    (tmp_path / "text.txt").write_text("to be, or not to be\n" * 20)
    command = ["prune", str(run), str(tmp_path / "out"), "--keep", "3", "--by", "reconstruction"]
    with pytest.raises(BadInput, match="--by reconstruction needs --data"):
        main(command)
    assert main([*command, "--data", str(tmp_path / "text.txt")]) == 0
    assert capsys.readouterr().out.count("its output changes by") == 2
