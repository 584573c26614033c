"""Warnings come when a run is in trouble, and only then."""

import json

import pytest

from gshardx.report.findings import findings
from gshardx.report.read import read_run
from tests.report.runs import write_events, write_run


def changed(folder, change):
    """The run with each line of its metrics as ``change`` leaves it."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        change(line)
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return read_run(folder)


@pytest.fixture
def folder(tmp_path):
    return write_run(tmp_path / "run", steps=100, layers=3, experts=8)


def test_a_good_run_has_none(folder):
    assert findings(read_run(folder)) == []


def test_a_collapsed_router_is_named_with_its_signs(tmp_path):
    said = findings(read_run(write_run(tmp_path / "run", steps=100, layers=3, experts=8, collapsed=True)))
    assert sum("collapsed" in line for line in said) == 1
    assert "MoE layer 2 has collapsed" in said[0]
    assert "4 \N{MULTIPLICATION SIGN} the mean load (4 is the most possible)" in said[0]
    assert "nats of 2.08" in said[0]
    assert "6 of its 8 experts get no tokens" in said[0]


@pytest.mark.parametrize(("name", "value"), [("load_max_over_mean", 3.9), ("entropy", 0.02), ("dead_experts", 5.0)])
def test_each_sign_is_enough(folder, name, value):
    said = findings(changed(folder, lambda line: line.update({f"moe/layer_1/{name}": value})))
    assert len(said) == 1
    assert "MoE layer 1 has collapsed" in said[0]


def test_signs_that_have_passed_are_not_told(folder):
    bad = {"moe/layer_1/entropy": 0.0, "moe/drop_fraction": 0.9}
    assert findings(changed(folder, lambda line: line["step"] < 80 and line.update(bad))) == []


def test_many_collapsed_routers_are_one_more_line(tmp_path):
    folder = write_run(tmp_path / "run", steps=50, layers=9, experts=8)
    bad = {f"moe/layer_{layer}/entropy": 0.0 for layer in range(9)}
    said = findings(changed(folder, lambda line: line.update(bad)))
    assert len(said) == 4
    assert "6 more routers have collapsed: MoE layers 3, 4, 5, 6, 7, 8" in said[3]


def test_every_expert_chosen_by_every_token_is_no_collapse(tmp_path):
    folder = write_run(tmp_path / "run", steps=50, layers=2, experts=2)
    assert findings(changed(folder, lambda line: line.update({"moe/layer_0/load_max_over_mean": 1.0}))) == []


def test_drops_above_a_fifth(folder):
    (said,) = findings(
        changed(folder, lambda line: line.update({"moe/drop_fraction": 0.25, "moe/layer_2/drop_fraction": 0.6}))
    )
    assert "25.0% of the choices are dropped (MoE layer 2: 60.0%)" in said


def test_losses_that_are_not_finite(folder):
    (said,) = findings(changed(folder, lambda line: line["step"] in (31, 40) and line.update({"learning/loss": None})))
    assert "training loss was not finite at 2 logged steps, first at step 31" in said


def test_lost_work(tmp_path):
    run = read_run(write_run(tmp_path / "run", steps=50, goodput={"lost_work": 100.0}))
    (said,) = findings(run)
    assert "18.0% of the time (1 min 40 s)" in said


def test_events_alone_warn_of_nothing(folder):
    write_events(folder, [(1, 5, "rollback", "the loss spiked")])
    assert findings(read_run(folder)) == []
