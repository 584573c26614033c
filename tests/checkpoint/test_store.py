"""Real Orbax directories: any mesh, any damage, a full disk."""

import shutil
import threading
from pathlib import Path

import grain
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gshardx.checkpoint.manifest import read_manifest
from gshardx.checkpoint.store import CheckpointStore, array_shapes, finished_steps, load, newest_good_step, set_aside
from gshardx.errors import BadInput
from gshardx.sharding import MeshConfig
from tests.checkpoint.trees import abstract, assert_equal, saved, tree
from tests.disks import small_disk


def iterator():
    return iter(grain.MapDataset.range(100).shuffle(seed=0).to_iter_dataset())


@pytest.mark.parametrize(
    "mesh_config",
    [MeshConfig(expert=8), MeshConfig(data=4, expert=2), MeshConfig(data=2, expert=4), MeshConfig()],
    ids=str,
)
def test_what_was_saved_on_one_mesh_is_read_on_another(tmp_path, mesh_config):
    folder = saved(tmp_path / "checkpoints")
    target = abstract(tree(mesh_config))
    loaded = load(folder, 4, target)
    assert_equal(loaded, tree(scale=4))
    assert loaded["params"]["w"].sharding == target["params"]["w"].sharding


def test_only_due_steps_are_saved_and_only_the_newest_kept(tmp_path):
    store = CheckpointStore(tmp_path / "checkpoints", every=2, keep=2)
    started = [store.save(step, tree(scale=step)) for step in range(1, 9)]
    assert not store.save(8, tree(), force=True), "a step is saved once"
    store.close()
    assert started == [False, True] * 4
    assert finished_steps(tmp_path / "checkpoints") == [6, 8]


def test_arrays_may_be_donated_as_soon_as_save_returns(tmp_path):
    folder = tmp_path / "checkpoints"
    store = CheckpointStore(folder, every=1, keep=2)
    items = tree(scale=3.0)
    expected = jax.device_get(items)
    store.save(1, items)
    spoil = jax.jit(lambda t: jax.tree.map(lambda a: a * 0, t), donate_argnums=0)
    jax.block_until_ready(spoil(items))
    store.close()
    assert_equal(load(folder, 1, abstract(tree())), expected)


def test_the_data_iterator_goes_on_where_it_was(tmp_path):
    folder, rows = tmp_path / "checkpoints", iterator()
    for _ in range(7):
        next(rows)
    store = CheckpointStore(folder, every=1, keep=2)
    store.save(1, {**tree(), "data": rows})
    expected = [int(next(rows)) for _ in range(10)]
    store.close()
    again = iterator()
    load(folder, 1, {"data": again})
    assert [int(next(again)) for _ in range(10)] == expected


def test_parameters_are_read_without_the_rest(tmp_path):
    folder = saved(tmp_path / "checkpoints")
    shutil.rmtree(folder / "4" / "rng")
    assert newest_good_step(folder, ("params",), report=pytest.fail) == 4
    assert_equal(load(folder, 4, {"params": abstract(tree())["params"]})["params"], tree(scale=4)["params"])
    assert newest_good_step(folder, report=lambda line: None) == 2


def test_a_thousand_flips_and_cuts_are_all_found_and_named(tmp_path):
    """Each harm is undone after it is looked at; the older step must be chosen every time."""
    folder = saved(tmp_path / "checkpoints")
    files = [path for path in sorted((folder / "4").rglob("*")) if path.is_file()]
    draw = np.random.default_rng(0)
    for trial in range(1000):
        path = files[trial % len(files)]
        whole = path.read_bytes()
        lines: list[str] = []
        if whole and draw.random() < 0.7:
            data = bytearray(whole)
            data[draw.integers(len(data))] ^= 1 << draw.integers(8)
            path.write_bytes(bytes(data))
        elif whole:
            path.write_bytes(whole[: draw.integers(len(whole))])
        else:
            path.unlink()
        assert newest_good_step(folder, report=lines.append) == 2
        name = path.relative_to(folder / "4").as_posix()
        assert len(lines) == 1
        assert name in lines[0], lines[0]
        path.write_bytes(whole)
    assert newest_good_step(folder, report=pytest.fail) == 4
    assert_equal(load(folder, 4, abstract(tree())), tree(scale=4))


def test_orbax_alone_restores_a_flipped_bit_without_a_word(tmp_path):
    """Why the manifest exists; if this fails, Orbax has learnt to check and the manifest may go."""
    folder = saved(tmp_path / "checkpoints")
    chunk = max((folder / "4" / "params" / "w").rglob("0"), key=lambda path: path.is_file() and path.stat().st_size)
    silent = 0
    whole = chunk.read_bytes()
    for bit in range(0, 8 * len(whole), 7):
        data = bytearray(whole)
        data[bit // 8] ^= 1 << bit % 8
        chunk.write_bytes(bytes(data))
        try:
            loaded = load(folder, 4, {"params": abstract(tree())["params"]})["params"]
        except Exception:
            continue
        silent += not np.array_equal(loaded["w"], tree(scale=4)["params"]["w"])
        break
    assert silent == 1


def test_damaged_steps_are_set_aside_and_can_be_saved_again(tmp_path):
    folder = saved(tmp_path / "checkpoints")
    next(path for path in (folder / "4").rglob("zarr.json")).write_text("{}")
    step = newest_good_step(folder, report=lambda line: None)
    assert step == 2
    set_aside(folder, after=step)
    assert (tmp_path / "damaged" / "4").is_dir()
    saved(folder, steps=(4,))
    assert newest_good_step(folder, report=pytest.fail) == 4


def test_what_a_killed_save_left_is_removed_and_never_chosen(tmp_path):
    folder = saved(tmp_path / "checkpoints")
    (folder / "4" / "manifest.json").unlink()
    lines: list[str] = []
    assert newest_good_step(folder, report=lines.append) == 2
    assert "never finished" in lines[0]
    saved(folder, steps=(4,))
    assert newest_good_step(folder, report=pytest.fail) == 4


def test_another_models_checkpoint_is_refused_with_both_shapes(tmp_path):
    folder = saved(tmp_path / "checkpoints")
    other = tree()
    other["params"]["w"] = jnp.zeros((16, 8))
    other["params"]["more"] = jnp.zeros(3)
    with pytest.raises(BadInput) as caught:
        load(folder, 4, abstract(other))
    said = str(caught.value)
    assert "params/w: model expects ([16, 8], 'float32'), checkpoint has ([16, 4], 'float32')" in said
    assert "params/more: model expects ([3], 'float32'), checkpoint has nothing" in said


def test_names_of_arrays_are_those_of_their_folders(tmp_path):
    folder = saved(tmp_path / "checkpoints")
    manifest = read_manifest(folder / "4")
    assert manifest.arrays == array_shapes(tree())
    for name in manifest.arrays:
        assert (folder / "4" / name).is_dir()


def test_a_save_that_fails_in_the_background_is_raised_and_the_older_step_stays(tmp_path, monkeypatch):
    folder = saved(tmp_path / "checkpoints", steps=(2,))
    store = CheckpointStore(folder, every=1, keep=3)
    gate = threading.Event()

    def fails(*args):
        gate.wait(10)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("gshardx.checkpoint.store.write_manifest", fails)
    store.save(3, tree())
    store.check()  # still under way: nothing to say
    gate.set()
    with pytest.raises(
        BadInput, match=r"3: the checkpoint could not be saved \(the disk is full\).*continues from step 2"
    ):
        store.wait()
    store.close()
    assert newest_good_step(folder, report=lambda line: None) == 2


def save_and_wait(store, items):
    store.save(3, items)
    store.wait()


@pytest.fixture
def tiny_disk(tmp_path):
    with small_disk(tmp_path / "disk", "400k") as disk:
        yield disk


@pytest.mark.parametrize("noticed", ["before the save", "during it"])
def test_a_full_disk_is_said_in_one_line_and_loses_nothing(tiny_disk: Path, monkeypatch, noticed):
    if noticed == "during it":
        monkeypatch.setattr("gshardx.checkpoint.store._bytes_to_write", lambda items: 0)
    folder = saved(tiny_disk / "checkpoints", steps=(2,))
    store = CheckpointStore(folder, every=1, keep=3)
    items = tree()
    items["params"]["w"] = jax.random.normal(jax.random.key(0), (1000, 1000))
    with pytest.raises(BadInput, match=r"could not be saved \(the disk is full.*continues from step 2"):
        save_and_wait(store, items)
    store.close()
    assert newest_good_step(folder, report=lambda line: None) == 2
    saved(folder, steps=(4,))
    assert newest_good_step(folder, report=pytest.fail) == 4
