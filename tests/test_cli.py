"""Command lines: a file, flags over it, and one line for each mistake."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from gshardx.arguments import CommandParser
from gshardx.cli import config_yaml, flatten, parse_config, read_config, run_command
from gshardx.config import Config
from gshardx.errors import BadInput

QUICKSTART = Path(__file__).parent.parent / "configs" / "quickstart.yaml"
KEYS = [key for key, _ in flatten(dataclasses.asdict(Config()))]


def parse(*argv):
    return parse_config("prog", "What it does.", list(argv))[0]


def complaint(*argv):
    with pytest.raises(BadInput) as caught:
        parse(*argv)
    message = str(caught.value)
    assert "\n" not in message
    return message


def written(path, text):
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


def train(*argv, **environment):
    """The real command, on a platform that JAX does not have: whatever starts JAX's devices fails."""
    return subprocess.run(
        [sys.executable, "-m", "gshardx.train", *argv],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "JAX_PLATFORMS": "none", **environment},
    )


@pytest.mark.parametrize(
    ("wrong", "nearest"),
    [
        ("model.moe.num_expert", "model.moe.num_experts"),  # a prefix, which argparse would take for the whole
        ("model.moe.num_expertz", "model.moe.num_experts"),
        ("num_experts", "model.moe.num_experts"),
        ("model.learning_rate", "optimizer.learning_rate"),
        ("modle.layers", "model.layers"),
        ("sede", "seed"),
    ],
)
def test_an_unknown_flag_names_the_nearest_key(wrong, nearest):
    assert complaint(f"--{wrong}", "64") == f"unknown key {wrong}; did you mean {nearest}?"
    assert complaint(f"--{wrong}=64") == f"unknown key {wrong}; did you mean {nearest}?"


@pytest.mark.parametrize(
    ("text", "wrong", "nearest"),
    [
        ("model: {moe: {num_expert: 64}}", "model.moe.num_expert", "model.moe.num_experts"),
        ("model: {mo: {top_k: 1}}", "model.mo.top_k", "model.moe.top_k"),
        ("mesh: {experts: 8}", "mesh.experts", "mesh.expert"),
        ("data: {sequence: 64}", "data.sequence", "data.sequence_length"),
    ],
)
def test_an_unknown_key_in_a_file_names_the_nearest_key(tmp_path, text, wrong, nearest):
    message = complaint("--config", written(tmp_path / "c.yaml", text))
    assert message.endswith(f"unknown key {wrong}; did you mean {nearest}?")


@pytest.mark.parametrize(
    ("text", "wrong", "nearest"),
    [("modle: {layers: 2}", "modle.layers", "model.layers"), ("sede: 2", "sede", "seed")],
)
def test_an_unknown_section_in_a_file_names_the_nearest_key(tmp_path, text, wrong, nearest):
    message = complaint("--config", written(tmp_path / "c.yaml", text))
    assert message.endswith(f"unknown key {wrong}; did you mean {nearest}?")


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("seed", "abc", "int"),
        ("seed", "1.5", "int"),
        ("train.steps", "many", "int"),
        ("train.batch_size", "16.0", "int"),
        ("optimizer.learning_rate", "fast", "float"),
        ("data.validation_fraction", "5%", "float"),
        ("model.moe.group_size", "7.5", "int"),
        ("model.dtype", "float16", "bfloat16"),
        ("model.activation", "tanh", "swiglu"),
        ("model.moe.dispatcher", "scatter", "gather"),
        ("model.moe.router", "hashed", "sigmoid_bias"),
    ],
)
def test_a_value_of_the_wrong_type_names_key_and_value_and_what_fits(tmp_path, key, value, said):
    section, _, name = key.rpartition(".")
    nested = {name: value}
    for part in reversed(section.split(".") if section else []):
        nested = {part: nested}
    from_file = ("--config", written(tmp_path / "c.yaml", yaml.safe_dump(nested)))
    for argv in ((f"--{key}", value), from_file):
        message = complaint(*argv)
        assert f'"{key}"' in message
        assert value in message
        assert said in message


@pytest.mark.parametrize(
    ("key", "value"), [("model.moe.group_size", "7.5"), ("model.dtype", "float16"), ("model.moe.dispatcher", "scatter")]
)
def test_what_fits_is_said_in_words_of_the_config_and_not_of_python(key, value):
    message = complaint(f"--{key}", value)
    assert "<class" not in message
    assert "typing" not in message
    assert "subtypes" not in message


@pytest.mark.parametrize(
    "argv", [("--seed",), ("--config",), ("stray",), ("-x",), ("--config", ""), ("--model", "nonsense")], ids=" ".join
)
def test_a_malformed_command_line_is_bad_input(argv):
    assert complaint(*argv)


def test_a_missing_file_and_a_folder_are_named(tmp_path):
    assert f"{tmp_path}/nope.yaml" in complaint("--config", str(tmp_path / "nope.yaml"))
    assert str(tmp_path) in complaint("--config", str(tmp_path))
    with pytest.raises(BadInput, match=f"{tmp_path}/nope.yaml"):
        read_config(tmp_path / "nope.yaml")


@pytest.mark.parametrize("text", ["a: [1\n", "\tmodel: 3\n", "model: {layers: 2\n", "a: !!python/object:os.system x\n"])
def test_broken_yaml_names_the_line(tmp_path, text):
    assert "line 1" in complaint("--config", written(tmp_path / "c.yaml", text))


@pytest.mark.parametrize("text", ["", "# only a comment\n", "- model\n- mesh\n", "hello\n", "12\n", "1: 2\n"])
def test_a_file_that_is_not_a_tree_of_keys_is_refused(tmp_path, text):
    assert complaint("--config", written(tmp_path / "c.yaml", text))
    with pytest.raises(BadInput, match=r"c\.yaml"):
        read_config(tmp_path / "c.yaml")


@pytest.mark.parametrize("text", ["", "- model\n", "a: [1\n", "seed: x\n", "sede: 1\n", "train: {step: 1}\n"], ids=repr)
def test_a_mistake_in_a_file_names_the_file(tmp_path, text):
    assert "c.yaml" in complaint("--config", written(tmp_path / "c.yaml", text))


@pytest.mark.parametrize("text", ["model: 3\n", "model: [1]\n", "mesh: 8\n", "model: {moe: 3}\n"])
def test_a_section_that_is_not_a_mapping_is_refused_by_name(tmp_path, text):
    message = complaint("--config", written(tmp_path / "c.yaml", text))
    assert text.strip("{}\n").split(":")[0] in message
    assert "function" not in message


def test_a_config_that_is_not_utf8_is_bad_input(tmp_path):
    assert "c.yaml: byte 0 is not UTF-8" in complaint("--config", written(tmp_path / "c.yaml", b"\xff\xfemodel: 3"))


def test_values_that_contradict_each_other_are_refused_wherever_they_come_from(tmp_path):
    file = written(tmp_path / "c.yaml", "model: {moe: {num_experts: 6}}\n")
    expected = "model.moe.num_experts = 6 does not divide over mesh.expert = 4"
    assert expected in complaint("--config", file, "--mesh.expert", "4")
    assert expected in complaint("--model.moe.num_experts", "6", "--mesh.expert", "4")
    assert parse("--config", file, "--mesh.expert", "2").mesh.expert == 2


def test_a_value_that_only_the_whole_config_allows_is_taken():
    assert parse("--model.layers", "3", "--model.moe.every", "3").model.layers == 3  # 3 is no multiple of the default 2
    assert parse("--model.moe.top_k", "12", "--model.moe.num_experts", "16").model.moe.top_k == 12


def test_a_flag_lies_over_the_file_and_the_last_file_over_the_first(tmp_path):
    first = written(tmp_path / "first.yaml", "seed: 1\nmodel: {layers: 2, moe: {num_experts: 16, top_k: 3}}\n")
    second = written(tmp_path / "second.yaml", "seed: 2\nmodel: {moe: {top_k: 1}}\n")
    config, file = parse_config("p", "", ["--config", first, "--config", second, "--seed", "3", "--mesh.data", "2"])
    assert (config.seed, config.mesh.data) == (3, 2)
    assert (config.model.moe.top_k, config.model.moe.num_experts, config.model.layers) == (1, 16, 2)
    assert config.train == Config().train
    assert file == Path(second)
    assert parse("--config", second, "--config", first).model.moe.top_k == 3


def test_a_flag_wins_over_a_file_named_after_it(tmp_path):
    assert parse("--seed", "3", "--config", written(tmp_path / "c.yaml", "seed: 1\n")).seed == 3


def test_without_arguments_the_defaults_hold():
    assert parse_config("p", "", []) == (Config(), None)


def test_null_leaves_an_optional_key_unset(tmp_path):
    file = written(tmp_path / "c.yaml", "model: {moe: {group_size: 64}}\n")
    assert parse("--config", file).model.moe.group_size == 64
    assert parse("--config", file, "--model.moe.group_size", "null").model.moe.group_size is None


def test_words_that_yaml_would_read_as_something_else_stay_strings():
    assert parse("--data.path", "123", "--run_dir", "007").data.path == "123"
    assert parse("--run_dir", "007").run_dir == "007"


def test_sources_are_a_path_a_list_of_them_or_a_mapping_to_shares(tmp_path):
    assert parse("--data.path", '["a/*.txt", "b"]').data.path == ["a/*.txt", "b"]
    mixture = {"texts/a.b/*.jsonl": 0.5, "b": 2.0}
    assert parse("--data.mixture", json.dumps(mixture)).data.mixture == mixture
    file = written(tmp_path / "c.yaml", f"data: {{mixture: {json.dumps(mixture)}, temperature: 5}}\n")
    made = parse("--config", file)
    assert (made.data.mixture, made.data.temperature) == (mixture, 5.0)
    assert read_config(Path(written(tmp_path / "d.yaml", config_yaml(made)))) == made


def test_read_config_says_which_file_breaks_which_rule(tmp_path):
    written(tmp_path / "c.yaml", "mesh: {expert: 0}\n")
    with pytest.raises(BadInput, match=r"c\.yaml: mesh\.expert = 0"):
        read_config(tmp_path / "c.yaml")


def test_flatten_gives_dotted_keys_and_keeps_what_is_empty_or_null():
    assert list(flatten({"a": {"b": {"c": 1}, "d": None}, "e": []})) == [("a.b.c", 1), ("a.d", None), ("e", [])]


def test_help_lists_every_key_in_lines_that_fit(capsys, monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    with pytest.raises(SystemExit) as done:
        parse("--help")
    text = capsys.readouterr().out
    assert done.value.code == 0
    options = {key.replace("losses.balance", "losses") for key in KEYS} | {"model.moe.router_options"}
    assert [key for key in options if f"--{key} " not in text] == []
    assert max(map(len, text.splitlines())) <= 120
    assert "<class" not in text
    assert "Experts that each token chooses." in text


def printed(capsys, *argv):
    with pytest.raises(SystemExit) as done:
        parse(*argv)
    assert done.value.code == 0
    return dict(flatten(yaml.safe_load(capsys.readouterr().out)))


def test_print_config_shows_the_whole_merged_tree(capsys):
    shown = printed(
        capsys, "--config", str(QUICKSTART), "--seed", "5", "--model.moe.group_size", "64", "--print_config"
    )
    assert list(shown) == KEYS
    expected = parse("--config", str(QUICKSTART), "--seed", "5", "--model.moe.group_size", "64")
    assert shown == dict(flatten(dataclasses.asdict(expected)))


def test_print_config_may_stand_first(capsys):
    shown = printed(capsys, "--print_config", "--config", str(QUICKSTART), "--seed", "5")
    assert list(shown) == KEYS
    assert (shown["mesh.expert"], shown["seed"]) == (8, 5)


def test_print_config_refuses_what_a_run_would_refuse(capsys):
    assert "unknown key sede" in complaint("--sede", "1", "--print_config")


@pytest.mark.parametrize("path", sorted(QUICKSTART.parent.glob("*.yaml")), ids=lambda path: path.name)
def test_every_config_of_the_repository_is_valid(path):
    assert read_config(path).train.steps > 0


def run(main, capsys):
    with pytest.raises(SystemExit) as done:
        run_command(main)
    return done.value.code, capsys.readouterr()


def test_a_command_exits_with_what_it_returns(capsys):
    assert run(lambda argv: 0, capsys)[0] == 0
    assert run(lambda argv: 143, capsys)[0] == 143


def test_bad_input_is_one_line_even_if_its_message_is_not(capsys):
    def main(argv):
        raise BadInput("a file:\n  line 3\n\tis wrong")

    code, said = run(main, capsys)
    assert (code, said.out, said.err) == (2, "", "error: a file: line 3 is wrong\n")


def test_a_bug_is_not_dressed_up_as_bad_input(monkeypatch):
    def main(argv):
        raise ValueError("a bug")

    with pytest.raises(ValueError, match="a bug"):
        run_command(main)


def check_one_line(done, *parts):
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    for part in parts:
        assert part in done.stderr


def test_the_command_says_one_line_and_exits_with_2(tmp_path):
    check_one_line(train("--model.moe.num_expert", "64"), "model.moe.num_expert;", "model.moe.num_experts?")
    check_one_line(train("--config", str(tmp_path / "nope.yaml")), "nope.yaml")
    broken = written(tmp_path / "c.yaml", "model: [1\n")
    check_one_line(train("--config", broken), "line 1")


def test_the_command_prints_its_config_without_starting_a_device():
    done = train("--config", str(QUICKSTART), "--print_config")
    assert (done.returncode, done.stderr) == (0, "")
    assert list(dict(flatten(yaml.safe_load(done.stdout)))) == KEYS


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["sub", "--num", "1"], "unrecognized arguments: --num 1 (see prog --help)"),  # not a short --number
        (["sub", "--number", "x"], "argument --number: invalid int value: 'x' (see prog sub --help)"),
        (["other"], "invalid choice: 'other'"),
    ],
)
def test_what_argparse_refuses_is_bad_input_of_commands_and_what_is_below_them(argv, said):
    parser = CommandParser(prog="prog")
    parser.add_subparsers(required=True, metavar="COMMAND").add_parser("sub").add_argument("--number", type=int)
    with pytest.raises(BadInput) as caught:
        parser.parse_args(argv)
    assert said in str(caught.value)
