"""Runs with other experts: the same logits where that can be, and the experts that should stay where it can't."""

import dataclasses
import json
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from gshardx.cli import read_config
from gshardx.config import ModelConfig, MoEConfig
from gshardx.convert.__main__ import main
from gshardx.convert.calibrate import Batch, compare, counts_on, forward_of
from gshardx.convert.incoming import convert_in
from gshardx.convert.rewrite import open_run, write_run
from gshardx.convert.surgery import (
    Changed,
    duplicated,
    fewer,
    likeness_of,
    matched,
    merged,
    most_chosen,
    of_matched,
    permuted,
    taken,
)
from gshardx.errors import BadInput
from gshardx.infer.load import load_run
from gshardx.sharding import MeshConfig
from tests.convert.test_incoming import with_tokenizer
from tests.convert.test_public import PUBLIC
from tests.convert.test_upcycle import TEXT


@pytest.fixture(
    scope="module", params=["mixtral", *(pytest.param(n, marks=pytest.mark.slow) for n in ("qwen2_moe", "olmoe"))]
)
def sparse(request, tmp_path_factory):
    place = tmp_path_factory.mktemp("sparse")
    convert_in(with_tokenizer(PUBLIC / request.param, place / "theirs"), place / "run", "float32", lambda line: None)
    return place / "run"


def experts_of(run):
    params = load_run(run, MeshConfig()).variables.params
    return jax.tree.map(np.asarray, params["stack"]["units"]["sparse"]["feed_forward"])


def test_reordered_and_copied_experts_compute_the_same(sparse, tmp_path, capsys):
    count = read_config(sparse / "config.yaml").model.moe.num_experts
    order = np.random.default_rng(0).permutation(count)
    assert main(["permute", str(sparse), str(tmp_path / "one"), "--order", ",".join(map(str, order))]) == 0
    assert main(["duplicate", str(tmp_path / "one"), str(tmp_path / "two"), "--copies", "3"]) == 0
    assert capsys.readouterr().out.count("the same function") == 2
    assert (tmp_path / "one" / "huggingface" / "config.json").is_file(), "it is still the public model"
    assert not (tmp_path / "two" / "huggingface").exists()
    before, after = experts_of(sparse), experts_of(tmp_path / "one")
    np.testing.assert_array_equal(after["experts"]["w_up"], before["experts"]["w_up"][:, order])
    np.testing.assert_array_equal(after["router"]["kernel"], before["router"]["kernel"][..., order])
    assert compare(sparse, tmp_path / "two", TEXT).difference < 1e-5


@pytest.mark.slow
def test_state_of_routers_follows(tmp_path):
    """Biases that decide the choice, of sigmoids that are not normalised."""
    theirs = with_tokenizer(PUBLIC / "mixtral", tmp_path / "theirs")
    convert_in(theirs, tmp_path / "run", "float32", lambda line: None)
    given = open_run(tmp_path / "run", None)
    model = given.config.model
    moe = dataclasses.replace(model.moe, router="sigmoid_bias", router_options={"renormalise": False})
    shape, draw = (model.moe_layers, moe.num_experts), np.random.default_rng(0)
    state = {"0": draw.normal(size=shape).astype(np.float32), "1": np.zeros(shape, np.float32)}

    def same(part):
        return given.outside(part) if part.layer is None else given.in_layer(part.layer, part.rest, part.expert)

    write_run(given, tmp_path / "biased", dataclasses.replace(model, moe=moe), same, state)
    assert main(["permute", str(tmp_path / "biased"), str(tmp_path / "one"), "--order", "3,1,0,2"]) == 0
    assert main(["duplicate", str(tmp_path / "one"), str(tmp_path / "two"), "--copies", "2"]) == 0
    found = np.asarray(load_run(tmp_path / "two", MeshConfig()).variables.router.bias)
    np.testing.assert_array_equal(found, np.repeat(state["0"][:, [3, 1, 0, 2]], 2, axis=1))
    assert compare(tmp_path / "biased", tmp_path / "two", TEXT).difference < 1e-5
    assert compare(tmp_path / "run", tmp_path / "two", TEXT).difference > 1e-3


def test_a_state_that_is_not_of_experts_stays():
    """Router quantile counts tokens."""
    arrays = {"0": np.arange(8.0).reshape(2, 4), "1": np.array([3.0, 5.0])}
    manifest = SimpleNamespace(arrays={f"router/{name}": None for name in arrays})
    given = SimpleNamespace(saved=SimpleNamespace(manifest=manifest), dtypes={}, state=arrays.get)
    found = Changed(given, {1: taken([3, 0], 4), 4: taken([1, 1], 4)}).state()
    np.testing.assert_array_equal(found["0"], [[3, 0], [5, 5]])
    np.testing.assert_array_equal(found["1"], [3, 5])


@pytest.mark.slow
def test_the_least_chosen_experts_go(sparse, tmp_path, capsys):
    (tmp_path / "text.txt").write_text("to be, or not to be\n" * 20)
    moe = read_config(sparse / "config.yaml").model.moe
    keep = moe.num_experts - 1
    flags = ["--keep", str(keep), "--data", str(tmp_path / "text.txt")]
    assert main(["prune", str(sparse), str(tmp_path / "run"), *flags]) == 0
    said = capsys.readouterr().out
    assert said.count(": keeps ") == 2
    assert "not the same function" in said
    assert "before" in said
    assert read_config(tmp_path / "run" / "config.yaml").model.moe.num_experts == keep
    counts = counts_on(sparse, TEXT, moe.num_experts)
    assert (counts.sum(-1) == TEXT[0].valid.sum() * moe.top_k).all()


def test_counts_of_training_will_do_and_router_columns_follow(tmp_path):
    convert_in(PUBLIC / "mixtral", tmp_path / "run", "float32", lambda line: None)
    model = read_config(tmp_path / "run" / "config.yaml").model
    with pytest.raises(BadInput, match="give --data PATH"):
        main(["prune", str(tmp_path / "run"), str(tmp_path / "out"), "--keep", "2"])
    load = np.arange(model.moe_layers * model.moe.num_experts, dtype=float).reshape(model.moe_layers, -1)
    (tmp_path / "run" / "expert_load.jsonl").write_text(json.dumps({"step": 0, "load": load.tolist()}) + "\n")
    for name in ("prune", "merge"):
        assert main([name, str(tmp_path / "run"), str(tmp_path / name), "--keep", "2"]) == 0
    before, pruned, joined = (open_run(tmp_path / name, None) for name in ("run", "prune", "merge"))
    for expert in range(2):
        stays = model.moe.num_experts - 2 + expert
        down = [one.in_layer(1, "feed_forward.experts.w_down", number) for one, number in
                ((before, stays), (pruned, expert), (joined, expert))]  # fmt: skip
        np.testing.assert_array_equal(down[0], down[1])
        kernels = [one.in_layer(1, "feed_forward.router.kernel") for one in (before, pruned, joined)]
        np.testing.assert_array_equal(kernels[0][:, stays], kernels[1][:, expert])
        np.testing.assert_array_equal(kernels[1], kernels[2])
    assert not (tmp_path / "out").exists()


def test_groups_are_of_the_most_alike_and_weighted_by_choices():
    counts = np.array([1.0, 9.0, 3.0, 0.0, 8.0])
    kernel = np.array([[1.0, 2.0, -1.0, 0.1, -3.0], [0.1, 0.0, 0.2, 0.0, 0.0]])
    mix, columns = merged(counts, likeness_of(kernel), 2)
    np.testing.assert_array_equal(columns, [1, 4])
    np.testing.assert_allclose(mix, [[0.1, 0.9, 0, 0, 0], [0, 0, 3 / 11, 0, 8 / 11]], atol=1e-8)
    assert most_chosen(np.array([2.0, 3.0, 2.0, 3.0]), 3) == [0, 1, 3]


def test_an_expert_whose_units_were_shuffled_is_matched_to_itself():
    draw = np.random.default_rng(0)
    shapes = {"w_up": (6, 9), "w_gate": (6, 9), "w_down": (9, 6), "b_up": (9,), "b_down": (6,)}
    one = {name: draw.normal(size=shape) for name, shape in shapes.items()}
    shuffled = draw.permutation(9)
    other = {name: of_matched(name, array, shuffled) for name, array in one.items()}
    units = matched(one, other)
    for name in one:
        np.testing.assert_array_equal(of_matched(name, other[name], units), one[name])


MODEL = ModelConfig(moe=MoEConfig(num_experts=8, top_k=2, router="top_k"))


def routed(**changes):
    return dataclasses.replace(MODEL, moe=dataclasses.replace(MODEL.moe, **changes))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda: permuted([0, 1, 1, 2], MODEL), r"--order 0,1,1,2: must have each of 0 ... 7 once"),
        (
            lambda: permuted([0, 4, 1, 5, 2, 6, 3, 7], routed(router_options={"groups": 2})),
            "groups = 2 must stay together, 4 experts each",
        ),
        (lambda: duplicated(routed(router="switch", top_k=1), 2), "copies of an expert would not add up"),
        (lambda: duplicated(routed(router="base", top_k=1), 2), "copies of an expert would not add up"),
        (lambda: duplicated(routed(router="sinkhorn", top_k=1), 2), "copies of an expert would not add up"),
        (lambda: duplicated(routed(router="sparse_mixer"), 2), "copies of an expert would not add up"),
        (lambda: duplicated(routed(router="relu"), 2), "copies of an expert would not add up"),
        (lambda: duplicated(routed(router="sigmoid_bias", router_options={"groups": 2}), 2), "not for sigmoid_bias"),
        (
            lambda: fewer(MODEL, 1),
            "--keep 1: must be below model.moe.num_experts = 8, and at least model.moe.top_k = 2",
        ),
        (lambda: fewer(MODEL, 8), "--keep 8: must be below"),
        (lambda: fewer(routed(router_options={"groups": 2}), 4), "can't become fewer"),
        *(
            (
                lambda of=of, change=change: change(routed(router=of)),
                "not have a column for each expert alone.* use a run",
            )
            for of in ("cosine", "adamoe", "dynmoe", "hash", "demix", "soft_moe", "stable", "moe_pp")
            for change in (lambda m: permuted(range(8), m), lambda m: duplicated(m, 2), lambda m: fewer(m, 4))
        ),
    ],
)
def test_what_can_not_be_is_one_line(change, said):
    with pytest.raises(BadInput, match=said):
        change()


def test_copies_of_unnormalised_sigmoids_are_scaled():
    model, _ = duplicated(routed(router="sigmoid_bias", router_options={"renormalise": False, "scale": 3.0}), 2)
    assert model.moe.router_options == {"renormalise": False, "scale": 1.5}
    assert (model.moe.num_experts, model.moe.top_k) == (16, 4)


CHANGES = {
    "permute": ("mixtral", ["--order", "2,0,3,1"]),
    "prune": ("mixtral", ["--keep", "2"]),
    "upcycle": ("llama", ["--experts", "4", "--top_k", "2", "--split", "2", "--shared", "4"]),
}


@pytest.mark.slow
@pytest.mark.parametrize("command", CHANGES)
def test_what_was_changed_computes_the_same_on_eight_devices(command, tmp_path):
    name, flags = CHANGES[command]
    convert_in(with_tokenizer(PUBLIC / name, tmp_path / "theirs"), tmp_path / "run", "float32", lambda line: None)
    if command == "prune":
        (tmp_path / "text.txt").write_text("to be, or not to be\n" * 20)
        flags = [*flags, "--data", str(tmp_path / "text.txt")]
    assert main([command, str(tmp_path / "run"), str(tmp_path / "changed"), *flags]) == 0
    (text,), found = TEXT, []
    rows = Batch(*(np.tile(part, (4, 1)) for part in text))
    for mesh in (MeshConfig(), MeshConfig(data=2, expert=2, tensor=2)):
        logits, metrics = forward_of(load_run(tmp_path / "changed", mesh))(rows)
        found.append((np.asarray(logits), np.sort(np.asarray(metrics.experts), axis=-1)))
    (one, chosen), (eight, chosen_on_eight) = found
    np.testing.assert_allclose(eight, one, atol=1e-5 * np.abs(one).max(), rtol=0)
    np.testing.assert_array_equal(chosen_on_eight, chosen)


def test_merged_experts_are_one_choice_however_many_copies_there_are():
    model = ModelConfig(moe=MoEConfig(num_experts=4, top_k=1, router="lory"))
    new, change = duplicated(model, 2)
    assert (new.moe.num_experts, new.moe.top_k) == (8, 1)
    np.testing.assert_array_equal(change.columns, [0, 0, 1, 1, 2, 2, 3, 3])
