"""docs/planner.md: its table of chips, limits, commands and names are those of the code."""

import importlib
import json
import re
import shlex
from pathlib import Path

import pytest
import yaml

from gshardx.cli import parse_config
from gshardx.plan.__main__ import _check_flags, _parser
from gshardx.plan.limits import read_limits
from gshardx.plan.topology import open_topology, prepare
from tests.plan.test_main import run
from tests.plan.tiny import planned

ROOT = Path(__file__).parent.parent.parent
PAGE = (ROOT / "docs" / "planner.md").read_text()
COMMANDS = [
    line
    for block in re.findall(r"```sh\n(.*?)```", PAGE, flags=re.S)
    for line in block.splitlines()
    if "gshardx" in line
]
(LIMITS,) = re.findall(r"```yaml\n(.*?)```", PAGE, flags=re.S)


@pytest.fixture
def ranking(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("plan_ranking")


def test_the_table_of_chips_is_the_code_s(ranking):
    written = PAGE.split("<!-- chips:begin -->\n")[1].split("\n<!-- chips:end -->")[0]
    assert written == "\n".join(ranking.chips())


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_are_understood(command):
    module, *flags = shlex.split(command, comments=True)[2:]
    assert module == "gshardx.plan"
    parser = _parser()
    arguments, rest = parser.parse_known_args(flags)
    _check_flags(parser, rest)
    config, _ = parse_config("prog", "", [f"--config={ROOT / arguments.config}", *rest])
    prepare(arguments.topology)
    assert config.mesh.size == len(open_topology(arguments.topology).devices)


def test_there_are_commands():
    assert len(COMMANDS) == 4


def test_the_example_of_limits_is_read(tmp_path):
    file = tmp_path / "limits.yaml"
    file.write_text(LIMITS)
    limits = read_limits(file)
    assert limits.memory == {"peak": 40e6}
    assert set(limits.numbers) == {"flops_per_device", "hlo_instructions", "predicted_step_seconds"}
    assert [one.op for one in limits.collectives.allowances] == ["all-to-all", "all-reduce"]
    assert yaml.safe_load(LIMITS)["small"] == limits.collectives.small == 4096


@pytest.mark.sweep
def test_the_example_in_ci_passes(tmp_path):
    (command,) = [command for command in COMMANDS if "--budget" in command]
    file = tmp_path / "limits.yaml"
    file.write_text(LIMITS)
    flags = [str(file) if word == "limits.yaml" else word for word in shlex.split(command)[3:]]
    code, out, err = run(*flags)
    assert (code, err, json.loads(out)["breaches"]) == (0, "", [])


def test_every_name_of_the_json_is_explained():
    facts = planned("forward")[0].as_json()
    names = {*facts, *facts["memory"], *facts["roofline"], *facts["collectives"][0], "breaches"}
    explained = set(re.findall(r"`([a-z_]+)`", PAGE)) | {
        name.strip() for inside in re.findall(r"`\{([a-z_, ]+)\}`", PAGE) for name in inside.split(",")
    }
    assert names <= explained, names - explained


def test_ranks_and_their_correlation(ranking):
    assert ranking.ranks([30.0, 10.0, 20.0]) == [3, 1, 2]
    assert ranking.ranks([1.0, 5.0, 1.0, 9.0]) == [1.5, 3, 1.5, 4]
    assert ranking.spearman([1, 2, 3, 4], [10, 20, 30, 40]) == 1
    assert ranking.spearman([1, 2, 3, 4], [4, 3, 2, 1]) == -1
    assert ranking.spearman([1, 2, 3, 4, 5], [2, 1, 4, 3, 5]) == pytest.approx(0.8)  # 1 - 6 * 4 / (5 * 24)


def test_what_the_ranking_says(ranking):
    ways = [
        ranking.Way("slow", estimated=3.0, compiled=1.0, measured=0.4),
        ranking.Way("fast", estimated=1.0, compiled=2.0, measured=0.2),
        ranking.Way("middle", estimated=2.0, compiled=3.0, measured=0.3),
    ]
    text = "\n".join(ranking.lines(ways, {"GFLOP/s": 1.5}, "a machine"))
    assert [line.split("|")[1].strip() for line in text.splitlines() if line.startswith("| ")][1:] == [
        "fast", "middle", "slow",
    ]  # fmt: skip
    assert text.endswith("a machine.")
    assert "Formulas: rank correlation (Spearman) with the measured seconds 1.00" in text
    assert "is number 1 of 3; the one that they put first (fast) takes 1.00 times" in text
    assert "Compiled programs: rank correlation (Spearman) with the measured seconds -0.50" in text
    assert "is number 2 of 3; the one that they put first (slow) takes 2.00 times" in text


def test_tables_go_between_their_own_markers(ranking):
    once = ranking.filled(PAGE, "ranking", "first\n")
    assert ranking.filled(once, "ranking", "second\n") == once.replace("\nfirst\n<!-- rank", "\nsecond\n<!-- rank")
    assert once.split("<!-- ranking:begin -->")[0] == PAGE.split("<!-- ranking:begin -->")[0]
    with pytest.raises(SystemExit, match="no <!-- ranking:begin -->"):
        ranking.filled("no markers", "ranking", "first")
