"""A run of two processes is the run of one: the same losses, one set of files, saved and ended together."""

import shutil
import signal
import time

import numpy as np
import pytest

from gshardx.checkpoint.store import finished_steps
from tests.checkpoint.good import newest_good_step
from tests.together import finish_both, start_both
from tests.train.processes import finish, lines_of, start, start_training, write_inputs

pytestmark = pytest.mark.slow  # real processes, each with its own start of JAX

MESH = ["--mesh.data", "2", "--mesh.fsdp", "2", "--mesh.expert", "2"]
FLAGS = ["--train.steps", "8", "--train.sample_tokens", "3", *MESH]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return write_inputs(tmp_path_factory.mktemp("processes"))


@pytest.fixture(scope="module")
def alone(place):
    finish(start_training(place, place / "alone", *FLAGS))
    return place / "alone"


@pytest.fixture(scope="module")
def both(place):
    """The run of two processes and what each printed."""
    return place / "both", finish_both(train_both(place, place / "both", *FLAGS))


def train_both(place, run, *more):
    return start_both(place, "-m", "gshardx.train", "--config", "tiny.yaml", "--run_dir", str(run), *more)


def assert_same_learning(run, other):
    there, here = lines_of(run), lines_of(other)
    assert [line["step"] for line in there] == [line["step"] for line in here] == list(range(1, len(here) + 1))
    for name in ("learning/loss", "learning/aux_loss", "learning/grad_norm"):
        np.testing.assert_allclose([line[name] for line in there], [line[name] for line in here], rtol=1e-5)
    evaluated = "evaluation/bits_per_byte"
    np.testing.assert_allclose(there[-1][evaluated], here[-1][evaluated], rtol=1e-5)


def test_two_processes_learn_what_one_does(alone, both):
    assert_same_learning(both[0], alone)


def test_process_0_alone_speaks_and_writes(both):
    run, ((out, err), (silent, no_error)) = both
    assert "bits per byte" in out
    assert "sample" in out
    assert "--coordinator" in next(line for line in out.splitlines() if line.startswith("resume"))
    assert silent == err == no_error == ""
    assert len(list((run / "tensorboard").iterdir())) == 1
    for name in ("config.yaml", "tokenizer.json"):
        assert (run / name).is_file()


def test_a_checkpoint_of_two_processes_is_whole(both):
    run, _ = both
    assert finished_steps(run / "checkpoints") == [4, 8]
    assert newest_good_step(run / "checkpoints", report=pytest.fail) == 8


@pytest.mark.parametrize("now", [1, 2])
def test_a_run_goes_on_with_another_number_of_processes(place, alone, both, now):
    """From step 4, to the same end: rows do not depend on who reads them."""
    source = both[0] if now == 1 else alone
    run = place / f"moved-to-{now}"
    shutil.copytree(source, run)
    shutil.rmtree(run / "checkpoints" / "8")
    if now == 1:
        out, _ = finish(start_training(place, run, *FLAGS))
    else:
        (out, _), _ = finish_both(train_both(place, run, *FLAGS))
    assert "from step 4" in out
    assert_same_learning(run, alone)


def test_a_signal_to_either_saves_and_ends_both(place, alone):
    run = place / "signal"
    processes = train_both(place, run, *FLAGS, "--train.steps", "100000")
    while not (run / "metrics.jsonl").exists() or len((run / "metrics.jsonl").read_text().splitlines()) < 2:
        assert all(process.poll() is None for process in processes), [p.communicate() for p in processes]
        time.sleep(0.05)
    processes[1].send_signal(signal.SIGTERM)
    (out, err), (_, its_error) = finish_both(processes, expected=128 + signal.SIGTERM)
    assert "after SIGTERM; to continue: " in out
    assert its_error == "SIGTERM: saving after this step\n"
    assert err == ""
    step = newest_good_step(run / "checkpoints", report=pytest.fail)
    assert step == lines_of(run)[-1]["step"] < 100000


def test_bad_input_that_process_0_alone_finds_ends_both(place, both):
    ends = finish_both(train_both(place, both[0], *FLAGS, "--optimizer.learning_rate", "0.5"), expected=2)
    for _, err in ends:
        assert "was trained with optimizer.learning_rate = 0.003, now 0.5" in err
        assert err.startswith("error: ")
        assert err.count("\n") == 1


def test_a_mesh_that_does_not_divide_over_the_processes_is_named(place):
    mesh = ["--mesh.data", "1", "--train.batch_size", "3"]
    for _, err in finish_both(train_both(place, place / "never", *mesh), expected=2):
        assert "a mesh of 1 device(s) does not divide over 2 processes; use 2 devices" in err


@pytest.mark.sweep
def test_generation_in_two_processes_gives_what_one_gives(place, both):
    options = ["generate", "--run", str(both[0]), "--prompt", "to be", "--max_new_tokens", "4", "--seed", "3"]
    expected, _ = finish(start(place, *options, module="gshardx.infer"))
    (out, _), (silent, _) = finish_both(start_both(place, "-m", "gshardx.infer", *options, "--mesh.expert", "2"))
    assert out == expected
    assert silent == ""
