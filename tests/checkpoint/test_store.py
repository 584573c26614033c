"""Real Orbax directories: any mesh, any damage, a full disk."""

import threading
from pathlib import Path

import grain
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gshardx.checkpoint.manifest import read_manifest
from gshardx.checkpoint.store import CheckpointStore, array_shapes, finished_steps, load
from gshardx.errors import BadInput
from gshardx.sharding import MeshConfig
from tests.checkpoint.good import newest_good_step
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
    started = [store.is_due(step) and store.save(step, tree(scale=step)) for step in range(1, 9)]
    assert not store.save(8, tree()), "a step is saved once"
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


def test_the_best_and_every_so_manieth_stay_beside_the_newest_also_after_a_restart(tmp_path):
    folder = tmp_path / "checkpoints"
    scores = dict(zip(range(1, 13), (9, 3, 8, 7, 2, 6, 5, 9, 9, 4, 9, 9), strict=True))

    def keep(steps):
        store = CheckpointStore(folder, every=1, keep=2, keep_every=4, keep_best=2)
        for step in steps:
            asked = store.is_best(scores[step])
            assert asked == (scores[step] < sorted([*(scores[s] for s in range(1, step)), 99, 99])[1])
            store.save(step, tree(scale=step), score=scores[step])
            store.wait()
        store.close()

    keep(range(1, 7))
    keep(range(7, 13))
    # Orbax looks at what may go when the next is saved.
    assert set(finished_steps(folder)) == {2, 5, 4, 8, 12, 11}


def test_a_step_that_was_not_scored_is_never_among_the_best(tmp_path):
    store = CheckpointStore(tmp_path / "checkpoints", every=1, keep=2, keep_best=1)
    for step, score in ((1, 5.0), (2, None), (3, None), (4, None)):
        store.save(step, tree(scale=step), score=score)
    store.close()
    assert finished_steps(tmp_path / "checkpoints") == [1, 3, 4]
