"""The command: exit codes, one line for each mistake, JSON and nothing else on stdout, no model-sized memory."""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from gshardx.cli import config_yaml, read_config
from gshardx.errors import BadInput
from gshardx.plan.__main__ import main
from gshardx.sharding import MeshConfig
from tests.plan.tiny import CHIP, config

ROOT = Path(__file__).parent.parent.parent
PUBLIC = ROOT / "configs" / "gshard" / "12l_128e.yaml"
SETTINGS = ("XLA_", "JAX_", "TPU_", "TF_CPP_", "ALLOW_MULTIPLE_LIBTPU_LOAD")


pytestmark = pytest.mark.usefixtures("settings_given_back")


@pytest.fixture
def tiny(tmp_path):
    file = tmp_path / "tiny.yaml"
    file.write_text(config_yaml(config(MeshConfig(expert=8))))
    return file


def start(*arguments, prefix=()):
    """The real command as a user's shell starts it, without the tests' own settings."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(SETTINGS)}
    return subprocess.Popen(
        [sys.executable, *(prefix or ("-m", "gshardx.plan")), *map(str, arguments)],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(*arguments, prefix=()):
    process = start(*arguments, prefix=prefix)
    out, err = process.communicate(timeout=900)
    return process.returncode, out, err


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (["--topology", "v5q:2x2"], "topology v5q:2x2: no family 'v5q'; did you mean v5p:2x2?"),
        (["--topology", "v5e:3x5"], "topology v5e:3x5: beyond one host the first two extents are even"),
        (["--topology", "v5e:999x2"], "the largest v5e slice is 16x16"),
        (["--topology", "cpu:0"], "every extent is at least 1"),
        (["--topology", "cpu:8", "--slices", "2"], "has no TPU slices; leave slices at 1"),
        (["--topology", "cpu:8", "--slices", "0"], "slices = 0: use 1 or more"),
        (
            ["--topology", "cpu:4"],
            "fsdp 1 x expert 8 x tensor 1) has 8 devices and topology cpu:4 has 4",
        ),
        (["--topology", "cpu:8", "--mesh.data=2", "--train.batch_size=16"], "16 devices and topology cpu:8 has 8"),
        (["--topology", "cpu:8", "--mesh.expert", "3"], "does not divide over mesh.expert = 3"),
        (["--topology", "cpu:8", "--stepp", "train"], "unknown flag --stepp; did you mean --step?"),
        (["--topology", "cpu:8", "--jsn"], "unknown flag --jsn; did you mean --json?"),
        (["--topology", "cpu:8", "--modle.layers", "4"], "unknown key modle.layers; did you mean model.layers?"),
        (["--topology", "cpu:8", "--step", "trian"], "invalid choice: 'trian'"),
        (["--topology", "cpu:8", "--rows", "0"], "--rows 0: must be 1 or more"),
        (["--topology", "cpu:8", "--chunk", "x"], "invalid int value: 'x'"),
        (["--topology", "cpu:8", "--step", "decode", "--rows", "9"], "= 9 does not divide over"),
        (["--topology", "cpu:8", "--model.moe.router_options", "{secnd: random}"], "secnd"),
        (["--topology", "cpu:8", "--budget", "absent.yaml"], "--budget absent.yaml: can't be read"),
        (["--topology", "cpu:8", "--plot", "absent/plan.png"], "--plot absent/plan.png: no folder absent"),
        (["--topology", "cpu:8", "--plot", "plan.bmq"], "no format of that suffix"),
        (["--topology", "cpu:8", "--search", "--step", "decode"], "--step is for one plan"),
        (["--topology", "cpu:8", "--search", "--budget", "a.yaml"], "--budget is for one plan"),
        (["--topology", "cpu:8", "--search", "--plot", "a.png"], "--plot is for one plan"),
        ([], "the following arguments are required: --topology"),
    ],
)
def test_a_mistake_gets_a_line(tiny, flags, line, monkeypatch):
    monkeypatch.setattr("gshardx.plan.topology.measure_cpu", lambda devices: CHIP)
    with pytest.raises(BadInput) as error:
        main(["--config", str(tiny), *flags])
    assert line in " ".join(str(error.value).split())


def test_a_config_that_is_not_there():
    with pytest.raises(BadInput, match=r"absent.yaml: can't be read"):
        main(["--config", "absent.yaml", "--topology", "cpu:8"])


def test_no_config():
    with pytest.raises(BadInput, match="the following arguments are required: --config"):
        main(["--topology", "cpu:8"])


def test_a_budget_with_unknown_keys(tiny, tmp_path):
    (tmp_path / "limits.yaml").write_text("memroy: {peak: 1}\n")
    with pytest.raises(BadInput, match="unknown key memroy; did you mean memory"):
        main(["--config", str(tiny), "--topology", "cpu:8", "--budget", str(tmp_path / "limits.yaml")])


def test_missing_libtpu(tiny, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.delenv("TPU_LIBRARY_PATH", raising=False)
    with pytest.raises(BadInput, match=r"libtpu is missing; pip install"):
        main(["--config", str(tiny), "--topology", "v5e:2x4"])


def test_the_codes_of_the_command(tiny, tmp_path, monkeypatch, capsys):
    """In one process, with a chip of round figures: 0 done, 3 broken, 4 too large."""
    monkeypatch.setattr("gshardx.plan.topology.measure_cpu", lambda devices: CHIP)
    limits = tmp_path / "limits.yaml"
    limits.write_text("{memory: {peak: 1e9}, hlo_instructions: 10}")
    flags = ["--config", str(tiny), "--topology", "cpu:8", "--step", "forward"]
    assert main([*flags, "--budget", str(limits), "--json"]) == 3
    facts = json.loads(capsys.readouterr().out)
    assert facts["breaches"] == [f"hlo_instructions is {facts['hlo_instructions']:,}; the limit is 10"]
    limits.write_text(f"hlo_instructions: {facts['hlo_instructions']}")
    assert main([*flags, "--budget", str(limits)]) == 0
    text = capsys.readouterr().out
    for word in ("forward step on cpu:8", "memory of a device: fits", "sent in a step", "all-to-all", "compiled  "):
        assert word in text
    large = ["--data.tokenizer=bpe", "--data.vocab_size=100000000", "--json"]
    assert main([*flags, *large]) == 4
    assert json.loads(capsys.readouterr().out)["fits"] is False


def test_advice_is_printed_where_it_does_not_fit(tiny, monkeypatch, capsys):
    monkeypatch.setattr("gshardx.plan.topology.measure_cpu", lambda devices: CHIP)
    assert (
        main(["--config", str(tiny), "--topology", "cpu:8", "--data.tokenizer=bpe", "--data.vocab_size=9000000"]) == 4
    )
    text = capsys.readouterr().out
    assert "DOES NOT FIT" in text
    assert "to make it fit: " in text


def test_a_real_mistake_is_one_line_and_code_2(tiny):
    code, out, err = run("--config", tiny, "--topology", "v5q:2x2")
    assert (code, out) == (2, "")
    assert err.startswith("error: topology v5q:2x2: no family 'v5q'; did you mean v5p:2x2?")
    assert err.count("\n") == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("topology", "json_flag"),
    [("cpu:8", False), ("v5e:2x4", True), pytest.param("v5e:2x4", False, marks=pytest.mark.sweep)],
)
def test_a_real_plan_is_all_that_is_printed(tiny, topology, json_flag):
    code, out, err = run("--config", tiny, "--topology", topology, *["--json"] * json_flag)
    assert (code, err) == (0, "")
    if json_flag:
        facts = json.loads(out)
        assert (facts["fits"], facts["devices"], facts["topology"]) == (True, 8, topology)
    else:
        assert out.startswith(f"train step on {topology}: 8 ")
    assert "\x1b" not in out  # no colours into a file


@pytest.mark.slow
def test_the_real_code_of_what_does_not_fit(tiny):
    code, out, err = run(
        "--config", tiny, "--topology", "v5e:2x4", "--data.tokenizer=bpe", "--data.vocab_size=100000000", "--json"
    )
    assert (code, err) == (4, "")
    assert json.loads(out)["fits"] is False


@pytest.mark.sweep
@pytest.mark.parametrize("step", ["train", "forward", "decode"])
def test_no_memory_of_the_models_size(step):
    """12 layers of 128 experts: 13 billion parameters, 53 GB; the command's own memory is XLA's."""
    wrapper = (
        "import resource, subprocess, sys; "
        "done = subprocess.run([sys.executable, '-m', 'gshardx.plan', *sys.argv[1:]], capture_output=True, text=True); "
        "print(done.returncode, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024, file=sys.stderr); "
        "print(done.stdout, done.stderr)"
    )
    arguments = ("--config", PUBLIC, "--topology", "v5p:4x4x8", "--step", step, "--json")
    _, out, err = run(*arguments, prefix=("-c", wrapper))
    code, peak = map(int, err.split())
    assert code == 0, out
    parameters = json.loads(out)["parameters"]
    assert parameters > 12 * 10**9
    assert peak < 4 * parameters / 8
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 < 4 * parameters / 8  # nor do the tests' own


@pytest.mark.slow
def test_two_planners_at_once_and_the_real_code_of_limits(tiny, tmp_path):
    limits = tmp_path / "limits.yaml"
    limits.write_text("hlo_instructions: 10")
    command = ("--config", tiny, "--topology", "v5e:2x4", "--step", "decode", "--budget", limits)
    both = [start(*command, "--json"), start(*command)]
    (facts, in_words), errors = zip(*[process.communicate(timeout=900) for process in both], strict=True)
    assert [process.returncode for process in both] == [3, 3], errors
    assert errors == ("", "")
    breach = f"hlo_instructions is {json.loads(facts)['hlo_instructions']:,}; the limit is 10"
    assert json.loads(facts)["breaches"] == [breach]
    assert f"over budget: {breach}" in in_words


@pytest.mark.sweep
def test_a_real_search_on_chips_that_are_not_here(tiny):
    code, out, err = run("--config", tiny, "--topology", "v5e:2x4", "--search", "--json")
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert found["winner"] in [one["flags"] for one in found["compiled"]]
    assert found["considered"] > found["fitting"] > len(found["compiled"])
    assert "bound by" in found["because"]


@pytest.mark.parametrize("file", sorted((ROOT / "configs").rglob("*.yaml")), ids=lambda file: file.stem)
def test_headers_of_configs_name_topologies_as_large_as_their_mesh(file):
    chosen, text = read_config(file), file.read_text()
    for line in text.splitlines():
        if "gshardx.plan" in line and "--topology" in line and "--mesh." not in line:
            shape = line.split("--topology")[1].split()[0].split(":")[1]
            size = 1
            for extent in shape.split("x"):
                size *= int(extent)
            assert size == chosen.mesh.size
