"""``python -m gshardx.checkpoint`` on real checkpoints."""

import fcntl
import shutil

import jax.numpy as jnp
import numpy as np
import pytest

from gshardx.checkpoint.__main__ import main
from gshardx.checkpoint.manifest import NAME
from gshardx.checkpoint.prune import kept
from gshardx.checkpoint.store import CheckpointStore, finished_steps, load
from gshardx.cli import config_yaml
from gshardx.config import Config
from gshardx.errors import BadInput
from tests.checkpoint.trees import abstract, saved, tree


@pytest.fixture
def run(tmp_path):
    """A run whose steps 2, 4 and 6 hold ``tree`` times the step."""
    folder = tmp_path / "run"
    saved(folder / "checkpoints", (2, 4, 6))
    (folder / "config.yaml").write_text(config_yaml(Config()))
    (folder / "tokenizer.json").write_text("{}")
    return folder


def flip(run, step, array):
    """One bit of an array."""
    path = next(path for path in (run / "checkpoints" / str(step) / array / "c").rglob("*") if path.is_file())
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def lines(capsys, *arguments):
    code = main([str(one) for one in arguments])
    return code, capsys.readouterr().out.splitlines()


def test_the_list_tells_what_was_never_finished_and_what_is_damaged(run, capsys):
    (run / "checkpoints" / "4" / NAME).write_text("{}")
    (run / "checkpoints" / "8").mkdir()
    code, said = lines(capsys, "list", run)
    assert code == 0
    assert [line.split()[0] for line in said] == ["step", "2", "4", "6", "8"]
    assert said[1].split()[-3:] == ["params", "rng", "finished"]
    assert said[2].endswith("manifest.json is damaged")
    assert said[4].endswith("never finished")


def test_arrays_and_their_values(run, capsys):
    code, said = lines(capsys, "inspect", run, "--step", 4, "--values")
    assert code == 0
    values = np.arange(64.0) * 4
    assert said[3].split()[:6] == ["w", "[16,", "4]", "float32", "64", said[3].split()[5]]
    assert said[3].split()[-3:] == [f"{(values**2).mean() ** 0.5:.4g}", "252", "0"]
    assert said[4].split()[:3] == ["in", "all", "69"]
    _, by_folder = lines(capsys, "inspect", run / "checkpoints" / "4", "--values")
    assert by_folder == said


def test_a_damaged_manifest_is_told_from_a_missing_one(run, capsys):
    (run / "checkpoints" / "4" / NAME).write_text("{}")
    (run / "checkpoints" / "8").mkdir()
    code, said = lines(capsys, "verify", run)
    assert code == 1
    states = ["good", "manifest.json is damaged", "good", "never finished"]
    assert [line.rpartition(": ")[2] for line in said] == states
    for step, state in zip((2, 4, 6, 8), states, strict=True):
        for named in ([run, "--step", step], [run / "checkpoints" / str(step)]):
            code, said = lines(capsys, "verify", *named)
            assert code == (0 if state == "good" else 1)
            assert said[0].endswith(f"checkpoints/{step}: {state}")


def test_damage_is_found_and_named(run, capsys):
    code, said = lines(capsys, "verify", run)
    assert (code, len(said)) == (0, 3)
    flip(run, 4, "params/w")
    code, said = lines(capsys, "verify", run)
    assert code == 1
    assert [line.rpartition(": ")[2] for line in (said[0], said[2])] == ["good", "good"]
    assert "params/w is damaged" in said[1]
    assert lines(capsys, "verify", run, "--step", 6)[0] == 0
    assert lines(capsys, "verify", run, "--step", 4)[0] == 1


def test_steps_are_told_apart_number_by_number(run, capsys):
    same, _ = lines(capsys, "diff", run, run)
    assert same == 0
    code, said = lines(capsys, "diff", run, run, "--other_step", 2)
    assert code == 1
    assert [line.split() for line in said[1:]] == [
        ["params/norm.scale", "4", "16", "0.667"],  # 0 times anything is 0
        ["params/w", "63", "252", "0.667"],
    ]
    assert lines(capsys, "diff", run, run, "--other_step", 2, "--item", "rng")[0] == 0


def test_arrays_that_cant_be_laid_side_by_side_have_no_figures(run, tmp_path, capsys):
    store = CheckpointStore(tmp_path / "other" / "checkpoints", every=1, keep=1)
    store.save(1, {"params": {"w": jnp.ones((3, 2)), "new": jnp.ones(4)}})
    store.close()
    code, said = lines(capsys, "diff", run, tmp_path / "other", "--item", "params")
    assert code == 1
    assert [line.strip() for line in said[1:]] == [
        f"params/new         only in {tmp_path / 'other' / 'checkpoints' / '1'}",
        f"params/norm.scale  only in {run / 'checkpoints' / '6'}",
        "params/w           [16, 4] and [3, 2]",
    ]
    assert lines(capsys, "diff", run, tmp_path / "other", "--item", "rng")[0] == 1, "one of them has it"


def test_integers_are_compared_as_integers(tmp_path, capsys):
    for name, key in (("a", [7, 2**32 - 1]), ("b", [7, 2**32 - 2])):
        store = CheckpointStore(tmp_path / name / "checkpoints", every=1, keep=1)
        store.save(1, {"rng": {"key": jnp.asarray(key, jnp.uint32)}})
        store.close()
    code, said = lines(capsys, "diff", tmp_path / "a", tmp_path / "b")
    assert code == 1
    assert said[1].split() == ["rng/key", "1", "1", "2.33e-10"]


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_what_is_exported_is_read_back(run, tmp_path, capsys, dtype):
    target = tmp_path / "weights"
    code, _ = lines(capsys, "export", run, target, "--step", 4, *(["--dtype", dtype] if dtype else []))
    assert code == 0
    assert lines(capsys, "verify", target)[0] == 0
    assert not (target / "checkpoints" / "4" / "rng").exists()
    assert (target / "tokenizer.json").read_text() == "{}"
    wanted = tree(scale=4)["params"]
    found = load(target / "checkpoints", 4, {"params": abstract(tree())["params"]})["params"]
    for name, a, b in (("w", found["w"], wanted["w"]), ("scale", found["norm"]["scale"], wanted["norm"]["scale"])):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(a, b, rtol=2**-8 if dtype else 0, err_msg=name)
    code, said = lines(capsys, "diff", run, target, "--step", 4, "--item", "params")
    assert code == (1 if dtype else 0)
    assert not dtype or "float32 and bfloat16" in said[1]


def test_damaged_weights_are_not_exported(run, tmp_path):
    flip(run, 6, "params/w")
    with pytest.raises(BadInput, match="params/w is damaged"):
        main(["export", str(run), str(tmp_path / "weights")])
    flip(run, 6, "params/w")
    flip(run, 6, "rng/key")
    assert main(["export", str(run), str(tmp_path / "weights")]) == 0
    with pytest.raises(BadInput, match="not empty"):
        main(["export", str(run), str(tmp_path / "weights")])


@pytest.mark.parametrize(
    ("last", "every", "best", "expected"),
    [
        (1, None, 0, {50}), (2, 20, 0, {20, 40, 50}), (9, None, 0, {10, 20, 30, 40, 50}), (1, 7, 0, {50}),
        (1, None, 1, {20, 50}), (1, None, 2, {10, 20, 50}), (1, None, 9, {10, 20, 40, 50}), (0, None, 0, set()),
    ],
)  # fmt: skip
def test_which_steps_stay(last, every, best, expected):
    assert kept({30: None, 10: 2.0, 20: 1.0, 50: None, 40: 2.0}, last, every, best) == expected


def test_the_best_are_told_and_stay(tmp_path, capsys):
    store = CheckpointStore(tmp_path / "checkpoints", every=1, keep=3)
    for step, score in ((1, 2.0), (2, 1.5), (3, None)):
        store.save(step, {"params": {"w": jnp.ones(2)}}, score=score)
    store.close()
    _, said = lines(capsys, "list", tmp_path)
    assert [line.split()[-2] for line in said[1:]] == ["2.0000", "1.5000", "params"]
    assert lines(capsys, "prune", tmp_path, "--keep_last", 1, "--keep_best", 1)[0] == 0
    assert finished_steps(tmp_path / "checkpoints") == [2, 3]


def test_steps_are_deleted_and_nothing_else(run, capsys):
    code, said = lines(capsys, "prune", run, "--keep_last", 1, "--keep_every", 4, "--dry_run")
    assert (code, said[-1]) == (0, "2 stay")
    assert finished_steps(run / "checkpoints") == [2, 4, 6]
    assert lines(capsys, "prune", run, "--keep_last", 1, "--keep_every", 4)[0] == 0
    assert finished_steps(run / "checkpoints") == [4, 6]
    assert lines(capsys, "verify", run)[0] == 0


def test_a_run_that_is_not_there_is_not_made(tmp_path):
    with pytest.raises(BadInput, match="no checkpoints there"):
        main(["prune", str(tmp_path / "nowhere"), "--keep_last", "1"])
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_deleted_while_somebody_trains(run):
    with (run / ".lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(BadInput, match="another process trains"):
            main(["prune", str(run), "--keep_last", "1"])
    assert finished_steps(run / "checkpoints") == [2, 4, 6]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["inspect", "RUN", "--step", "3"], "no such step; finished: 2, 4, 6"),
        (["inspect", "RUN", "--item", "ema"], "--item ema: .* has params, rng"),
        (["diff", "RUN", "RUN", "--item", "parms"], "--item parms: .*6 has params, rng; .*6 has params, rng"),
        (["verify", "RUN", "--step", "3"], "no such step; there: 2, 4, 6"),
        (["prune", "RUN", "--keep", "1"], "--keep_last.*see python -m gshardx.checkpoint prune --help"),
        (["list", "RUN/nowhere"], "no checkpoints there"),
        (["prune", "RUN"], "--keep_last"),
        (["prune", "RUN", "--keep_last", "0"], "--keep_last 0: must be 1 or more"),
        (["export", "RUN", "RUN/x", "--dtype", "int8"], "invalid choice"),
    ],
)
def test_what_cant_be_done_is_told(run, arguments, said):
    with pytest.raises(BadInput, match=said):
        main([one.replace("RUN", str(run)) for one in arguments])


def test_a_run_without_a_finished_step(run):
    shutil.rmtree(run / "checkpoints")
    (run / "checkpoints").mkdir()
    with pytest.raises(BadInput, match="no finished step"):
        main(["inspect", str(run)])
