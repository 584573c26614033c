"""What a user gets wrong: one line on stderr that says what, where and the mend; exit code 2; nothing lost."""

import shutil
import subprocess

import pytest

from tests.checkpoint.good import newest_good_step
from tests.disks import small_disk
from tests.train.processes import finish, start, start_training, write_inputs

pytestmark = pytest.mark.slow  # real processes, each with its own start of JAX


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return write_inputs(tmp_path_factory.mktemp("bad"))


@pytest.fixture(scope="module")
def run(place):
    finish(start_training(place, place / "run", "--train.steps", "8"))
    return place / "run"


def error_of(process):
    _, err = finish(process, expected=2)
    assert err.startswith("error: "), err
    assert err.count("\n") == 1, err
    return err


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--model.moe.num_expert", "64"], "unknown key model.moe.num_expert; did you mean model.moe.num_experts?"),
        (["--model.layers", "many"], '"model.layers": expected int. Got value: many'),
        (["--mesh.expert", "3", "--mesh.data", "1"], "num_experts = 4 does not divide over mesh.expert = 3"),
        (["--train.batch_size", "12"], "does not divide over mesh data * fsdp * expert = 8; use a batch_size of 16"),
        (["--model.moe.top_k", "5"], "model.moe.top_k = 5 is more than model.moe.num_experts = 4; use a top_k of 4"),
        (["--data.path", "nowhere/*.txt"], "data.path = nowhere/*.txt: no such file"),
        (["--data.path", "empty.txt"], "data.path = empty.txt: no text in it"),
        (["--data.path", "short.jsonl"], "less than one sequence of 32"),
        (["--data.path", "bytes.txt"], "bytes.txt: byte 2 is not UTF-8"),
        (["--data.path", "folder.txt/inner.parquet"], "inner.parquet: not a readable Parquet file"),
        (["--data.tokenizer", "broken.json"], "broken.json: not a tokenizer.json, or a damaged one"),
        (["--run_dir", "empty.txt/run"], "run_dir empty.txt/run: can't be written"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)  # fmt: skip
def test_a_mistake_is_one_line(place, flags, said):
    (place / "empty.txt").write_text("\n \n")
    (place / "short.jsonl").write_text('{"text": "to be"}\n{"text": "or not"}\n')
    (place / "bytes.txt").write_bytes(b"ab\xff\xfe")
    (place / "folder.txt").mkdir(exist_ok=True)
    (place / "folder.txt" / "inner.parquet").write_bytes(b"PAR1 no more")
    (place / "broken.json").write_text('{"version": "1.0", "model": {')
    assert said in error_of(start_training(place, place / "never", *flags))
    assert not (place / "never" / "checkpoints").exists()


def test_a_run_refuses_another_learning_rate_and_another_text(place, run):
    said = error_of(start_training(place, run, "--train.steps", "8", "--optimizer.learning_rate", "0.5"))
    assert "was trained with optimizer.learning_rate = 0.003, now 0.5; use the old value or another --run_dir" in said
    text = (place / "text.jsonl").read_text()
    (place / "text.jsonl").write_text(text.replace("question", "answer"))
    said = error_of(start_training(place, run, "--train.steps", "9"))
    (place / "text.jsonl").write_text(text)
    assert "the data is not what step 8 was trained with" in said


def test_a_damaged_tokenizer_is_named_by_training_and_by_generation(place, run):
    harmed = place / "harmed"
    shutil.copytree(run, harmed)
    whole = (harmed / "tokenizer.json").read_text()
    (harmed / "tokenizer.json").write_text(whole[:-20])
    assert "tokenizer.json" in error_of(start_training(place, harmed, "--train.steps", "9"))
    generate = ["generate", "--run", str(harmed), "--prompt", "a"]
    assert "tokenizer.json: not a tokenizer.json, or a damaged one" in error_of(
        start(place, *generate, module="gshardx.infer")
    )
    (harmed / "tokenizer.json").write_text(whole.replace('"a":', '"b":', 1).replace('"b":', '"a":', 2))
    assert "tokenizer.json: " in error_of(start(place, *generate, module="gshardx.infer"))
    (harmed / "tokenizer.json").write_text(whole)
    finish(start(place, *generate, "--max_new_tokens", "2", module="gshardx.infer"))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["generate", "--run", "nowhere", "--prompt", "a"], "--run nowhere: no config.yaml there"),
        (["generate", "--run", "run", "--prompt", "a", "--top_p", "1.5"], "--top_p = 1.5: must be 0 to 1"),
        (["generate", "--run", "run", "--prompt", ""], "no prompt: give --prompt"),
        (
            ["generate", "--run", "run", "--prompt", "a", "--max_length", "9", "--max_new_tokens", "9"],
            "over the length of 9",
        ),
        (["generate", "--run", "run", "--prompt", "a", "--mesh.expert", "3"], "does not divide over mesh.expert = 3"),
        (["generate", "--run", "run", "--promt", "a"], "unrecognized arguments: --promt a"),
        (["generat"], "invalid choice: 'generat'"),
    ],
    ids=lambda value: " ".join(value[3:]) if isinstance(value, list) else "",
)
def test_a_mistake_in_generation_is_one_line(place, run, arguments, said):
    assert said in error_of(start(place, *arguments, module="gshardx.infer"))


def test_two_trainers_do_not_share_a_directory(place):
    first = start_training(place, place / "shared", "--train.steps", "100000")
    while not (place / "shared" / "config.yaml").exists():
        assert first.poll() is None, first.communicate()
    said = error_of(start_training(place, place / "shared"))
    first.kill()
    first.communicate()
    assert "another process trains in it" in said


@pytest.fixture
def tiny_disk(tmp_path):
    with small_disk(tmp_path / "disk", "1500k") as disk:
        yield disk


def test_a_full_disk_ends_the_run_with_one_line_and_the_same_command_continues(place, tiny_disk):
    run = tiny_disk / "run"
    said = error_of(start_training(place, run, "--checkpoint.keep", "1000", "--checkpoint.every", "2"))
    assert "bytes to write" in said
    assert "free); mend that and run the same command: it continues from step" in said
    good = newest_good_step(run / "checkpoints", report=lambda line: None)
    assert good >= 2
    subprocess.run(["mount", "-o", "remount,size=100m", str(tiny_disk)], check=True)
    out, _ = finish(start_training(place, run, "--checkpoint.keep", "1000", "--checkpoint.every", "2"))
    assert f"from step {good}" in out
