"""The newest step whose files are as they were saved comes back; a damaged one is named and gives way."""

import hashlib
import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest

from gshardx.checkpoint.manifest import NAME
from gshardx.checkpoint.restore import restore
from gshardx.checkpoint.store import CheckpointStore, load, set_aside
from gshardx.errors import BadInput
from tests.checkpoint.good import newest_good_step
from tests.checkpoint.trees import abstract, assert_equal, saved, tree


def step_of(folder, say=pytest.fail, **options):
    """The step that is restored, whose arrays are what was saved then."""
    step, items = restore(folder, lambda *_: abstract(tree()), say, **options)
    assert_equal(items, tree(scale=step))
    return step


def flip(path, bit):
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(bytes(data))


def chunk_of(step):
    return next(path for path in sorted((step / "params" / "w" / "c").rglob("*")) if path.is_file())


def test_the_newest_step_is_restored_or_the_newest_below_one(tmp_path):
    folder = saved(tmp_path / "checkpoints", steps=(2, 4, 6))
    assert step_of(folder) == 6
    assert step_of(folder, below=6) == 4
    assert restore(folder, lambda *_: abstract(tree()), pytest.fail, below=2) is None
    assert restore(tmp_path / "none", lambda *_: abstract(tree()), pytest.fail) is None


def test_other_items_may_be_damaged(tmp_path):
    folder = saved(tmp_path / "checkpoints")
    shutil.rmtree(folder / "4" / "rng")
    params = {"params": abstract(tree())["params"]}
    step, items = restore(folder, lambda *_: params, pytest.fail)
    assert step == 4
    assert_equal(items["params"], tree(scale=4)["params"])
    assert step_of(folder, say=lambda line: None) == 2


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore:coroutine:RuntimeWarning")
def test_a_thousand_flips_and_cuts_are_all_found_and_named(tmp_path):
    """Each harm is undone after it is looked at; the older step must be chosen every time, with its own values."""
    folder = saved(tmp_path / "checkpoints")
    files = [path for path in sorted((folder / "4").rglob("*")) if path.is_file()]
    draw = np.random.default_rng(0)
    for trial in range(1000):
        path = files[trial % len(files)]
        whole = path.read_bytes()
        lines: list[str] = []
        if whole and draw.random() < 0.7:
            flip(path, int(draw.integers(8 * len(whole))))
        elif whole:
            path.write_bytes(whole[: draw.integers(len(whole))])
        else:
            path.unlink()
        if trial % 20 == 0:
            assert step_of(folder, say=lines.append) == 2
        else:  # the same checksums without the loading, which takes longer
            assert newest_good_step(folder, report=lines.append) == 2
        name = path.relative_to(folder / "4").as_posix()
        assert len(lines) == 1
        assert name in lines[0], lines[0]
        path.write_bytes(whole)
    assert step_of(folder) == 4


def test_damaged_steps_are_set_aside_and_can_be_saved_again(tmp_path):
    folder = saved(tmp_path / "checkpoints")
    next(path for path in (folder / "4").rglob("zarr.json")).write_text("{}")
    step = step_of(folder, say=lambda line: None)
    assert step == 2
    set_aside(folder, after=step)
    assert (tmp_path / "damaged" / "4").is_dir()
    saved(folder, steps=(4,))
    assert step_of(folder) == 4


def test_what_a_killed_save_left_is_removed_and_never_chosen(tmp_path):
    folder = saved(tmp_path / "checkpoints")
    (folder / "4" / "manifest.json").unlink()
    lines: list[str] = []
    assert step_of(folder, say=lines.append) == 2
    assert "never finished" in lines[0]
    saved(folder, steps=(4,))
    assert step_of(folder) == 4


def test_what_the_caller_refuses_is_not_loaded(tmp_path):
    folder = saved(tmp_path / "checkpoints")

    def refuse(step, manifest):
        raise BadInput(f"step {step} has {manifest.extra['fact']}")

    with pytest.raises(BadInput, match="step 4 has 1"):
        restore(folder, refuse, pytest.fail)


def test_another_models_checkpoint_is_no_damage(tmp_path):
    folder, other = saved(tmp_path / "checkpoints"), tree()
    other["params"]["w"] = jnp.zeros((16, 8))
    with pytest.raises(BadInput, match="params/w: model expects"):
        restore(folder, lambda *_: abstract(other), pytest.fail)


def test_an_error_that_no_damage_explains_is_raised(tmp_path, monkeypatch):
    folder = saved(tmp_path / "checkpoints")

    def fails(*args):
        raise RuntimeError("the network is gone")

    monkeypatch.setattr("gshardx.checkpoint.restore.load", fails)
    with pytest.raises(RuntimeError, match="the network is gone"):
        restore(folder, lambda *_: abstract(tree()), pytest.fail)


def test_an_error_that_damage_explains_is_that_damage(tmp_path, monkeypatch):
    """As with compressed values, which can't be read at all when they are damaged."""
    folder, lines = saved(tmp_path / "checkpoints"), []

    def fails_first(folder, step, items):
        if step == 4:
            raise ValueError("zstd: corrupt")
        return load(folder, step, items)

    monkeypatch.setattr("gshardx.checkpoint.restore.load", fails_first)
    flip(chunk_of(folder / "4"), 7)
    assert step_of(folder, say=lines.append) == 2
    assert "checksum differs" in lines[0]


def test_a_manifest_without_a_kind_of_checksum_has_sha_256(tmp_path):
    """As gshardx wrote them before."""
    folder = tmp_path / "checkpoints"
    store = CheckpointStore(folder, every=1, keep=2)
    store.save(3, tree(scale=3))
    store.close()
    step = folder / "3"
    content = json.loads((step / NAME).read_text().splitlines()[0])
    del content["checksum"]
    content["files"] = {
        name: [size, hashlib.sha256((step / name).read_bytes()).hexdigest()]
        for name, (size, _) in content["files"].items()
    }
    body = json.dumps(content)
    (step / NAME).write_text(f"{body}\n{hashlib.sha256(body.encode()).hexdigest()}\n")
    assert step_of(folder) == 3
    flip(chunk_of(step), 7)
    assert restore(folder, lambda *_: abstract(tree()), lambda line: None) is None
