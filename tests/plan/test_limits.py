"""Files of limits: each mistake its line, each kind of breach told, a plan's own figures kept and one byte less not."""

import dataclasses
import json

import pytest
import yaml

from gshardx.errors import BadInput
from gshardx.plan.limits import read_limits
from tests.plan.tiny import planned, refused

CEILINGS = ("flops_per_device", "hlo_instructions", "predicted_step_seconds")


@pytest.fixture
def limits(tmp_path):
    """Limits read from a file that holds a text or a tree."""

    def read(content):
        file = tmp_path / "limits.yaml"
        file.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
        return read_limits(file)

    return read


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ("", "no limits in it; write some"),
        ("{}", "no limits in it"),
        ("- 1", "no limits in it"),
        ("a: [", "not YAML"),
        ("memry: {peak: 1}", "unknown key memry; did you mean memory?"),
        ("hlo_instruction: 1", "unknown key hlo_instruction; did you mean hlo_instructions?"),
        ("1: 2", "unknown key 1; did you mean"),
        ("memory: 5", "memory is a mapping of kinds"),
        ("memory: {paek: 1}", "memory: unknown key paek; did you mean peak?"),
        ("memory: {peak: lots}", "memory.peak = lots: a limit is a number, 0 or more"),
        ("memory: {peak: -1}", "memory.peak = -1: a limit is a number, 0 or more"),
        ("memory: {peak: .nan}", "memory.peak = nan: a limit is a number"),
        ("memory: {peak: .inf}", "memory.peak = inf: a limit is a number"),
        ("memory: {peak: true}", "memory.peak = True: a limit is a number"),
        ("memory: {peak: null}", "memory.peak = None: a limit is a number"),
        ("memory: {peak: [1]}", "memory.peak = [1]: a limit is a number"),
        ("flops_per_device: x", "flops_per_device = x: a limit is a number"),
        ("predicted_step_seconds: {a: 1}", "a limit is a number"),
        ("small: 5", "small belongs to collectives"),
        ("{collectives: [], small: -5}", "small = -5: a limit is a number"),
        ("collectives: {op: all-to-all}", "collectives is a list"),
        ("collectives: [5]", "collectives[0]: needs op and axes"),
        ("collectives: [{op: all-to-all}]", "collectives[0]: needs op and axes"),
        ("collectives: [{axes: [expert]}]", "collectives[0]: needs op and axes"),
        ("collectives: [{op: all-to-all, axes: expert}]", "collectives[0]: needs op and axes"),
        ("collectives: [{op: alltoall, axes: [expert]}]", "collectives[0]: budget: no collective is called 'alltoall'"),
        ("collectives: [{op: all-to-all, axes: [experts]}]", "unknown mesh axis experts; did you mean expert?"),
        ("collectives: [{op: all-to-all, axes: [expert], counts: 1}]", "unknown key counts; did you mean count?"),
        ("collectives: [{op: all-to-all, axes: [expert], count: many}]", "collectives[0].count = many: a limit"),
        (
            "collectives: [{op: all-to-all, axes: [expert]}, {op: all-to-all, axes: [expert], count: 2}]",
            "collectives[1]: all-to-all over expert is listed twice",
        ),
    ],
)
def test_a_mistake_gets_a_line(limits, content, line):
    with pytest.raises(BadInput) as error:
        limits(content)
    assert str(error.value).startswith("--budget ")
    assert line in " ".join(str(error.value).split())


def test_a_file_that_cannot_be_read(tmp_path):
    with pytest.raises(BadInput, match=r"can't be read .No such file"):
        read_limits(tmp_path / "absent.yaml")
    with pytest.raises(BadInput, match=r"can't be read .Is a directory"):
        read_limits(tmp_path)
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(BadInput, match="not YAML"):
        read_limits(tmp_path / "binary")


def own_figures(plan):
    """A file of limits made of a plan's own JSON."""
    facts = json.loads(json.dumps(plan.as_json()))
    names = ("op", "axes", "count", "bytes_per_device")
    collectives = [{name: one[name] for name in names} for one in facts["collectives"]]
    return {name: facts[name] for name in (*CEILINGS, "memory")} | {"collectives": collectives}


@pytest.mark.parametrize("step", ["train", "prefill"])
def test_a_plan_keeps_its_own_figures(limits, step):
    plan = planned(step)[0]
    assert limits(own_figures(plan)).breaches(plan) == []


@pytest.mark.parametrize("kind", ["peak", "parameters", "temporaries"])
def test_a_byte_less_of_memory_is_a_breach(limits, kind):
    plan = planned("train")[0]
    figures = own_figures(plan)
    figures["memory"][kind] -= 1
    (line,) = limits(figures).breaches(plan)
    assert line == (f"memory.{kind} is {plan.memory[kind]:,} bytes a device; the limit is {plan.memory[kind] - 1:,}")


@pytest.mark.parametrize("name", CEILINGS)
def test_a_number_above_its_limit(limits, name):
    plan = planned("train")[0]
    (line,) = limits({name: getattr(plan, name) * 0.9}).breaches(plan)
    assert line.startswith(f"{name} is ")
    assert limits({name: getattr(plan, name)}).breaches(plan) == []


@pytest.mark.parametrize("amount", ["count", "bytes_per_device"])
def test_one_collective_less_is_a_breach(limits, amount):
    plan = planned("train")[0]
    for at in range(len(own_figures(plan)["collectives"])):
        figures = own_figures(plan)
        figures["collectives"][at][amount] -= 1
        (line,) = limits(figures).breaches(plan)
        assert line.startswith(f"{figures['collectives'][at]['count'] + (amount == 'count')} ")
        assert f"{figures['collectives'][at]['op']} over {'*'.join(figures['collectives'][at]['axes'])}" in line


def test_what_is_not_listed_is_not_allowed(limits):
    plan = planned("train")[0]
    figures = own_figures(plan)
    figures["collectives"] = [one for one in figures["collectives"] if one["op"] != "all-to-all"]
    (line,) = limits(figures).breaches(plan)
    assert "all-to-all over expert" in line
    assert line.endswith("the budget allows none")


def test_small_reductions_need_no_row(limits):
    plan = planned("train")[0]
    others = [one for one in own_figures(plan)["collectives"] if one["op"] != "all-reduce"]
    assert limits({"collectives": others, "small": 1e9}).breaches(plan) == []
    assert len(limits({"collectives": others}).breaches(plan)) > 0


def test_an_exchange_that_vanished_is_a_breach(limits):
    item = {"op": "all-to-all", "axes": ["expert"], "least": 5}
    plan = planned("train")[0]
    (line,) = [line for line in limits({"collectives": [item], "small": 1e9}).breaches(plan) if "expects" in line]
    assert line.endswith("the budget expects 5 or more")


def test_axes_are_a_set(limits):
    plan = planned("train")[0]
    figures = own_figures(plan)
    for one in figures["collectives"]:
        one["axes"].reverse()
    assert any(len(one["axes"]) > 1 for one in figures["collectives"])
    assert limits(figures).breaches(plan) == []


def test_exponents_without_a_point_are_numbers(limits):
    """YAML 1.1 reads 9e10 as a string."""
    assert limits("memory: {peak: 9e10}").memory == {"peak": 9e10}


def test_what_is_unknown_breaks_its_limit(limits, monkeypatch):
    plan = refused(monkeypatch)
    tree = {"memory": {"temporaries": 1e18}, "hlo_instructions": 1e18, "collectives": []}
    lines = limits(tree).breaches(plan)
    assert len(lines) == 3
    assert "memory.temporaries is unknown" in lines[0]
    assert "hlo_instructions is unknown" in lines[1]
    assert "collectives are not known" in lines[2]


def test_what_is_not_named_is_free(limits):
    plan = dataclasses.replace(planned("train")[0], hlo_instructions=10**9)
    assert limits({"memory": {"peak": 1e12}}).breaches(plan) == []
