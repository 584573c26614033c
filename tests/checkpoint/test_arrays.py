"""Arrays piece by piece, against the whole."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from gshardx.checkpoint import arrays
from gshardx.checkpoint.arrays import convert, pieces
from gshardx.checkpoint.store import CheckpointStore
from gshardx.errors import BadInput
from tests.disks import small_disk

SHAPES = [(), (1,), (13,), (3, 5), (4, 1, 7), (2, 3, 2, 5)]


@pytest.fixture(scope="module")
def step(tmp_path_factory):
    """Arrays of all shapes, and what they hold."""
    draw, folder = np.random.default_rng(0), tmp_path_factory.mktemp("arrays") / "checkpoints"
    values = {str(number): draw.normal(size=shape).astype(np.float32) for number, shape in enumerate(SHAPES)}
    store = CheckpointStore(folder, every=1, keep=1)
    store.save(1, {"params": {name: jnp.asarray(value) for name, value in values.items()}})
    store.close()
    return folder / "1", values


@pytest.mark.parametrize("most", [1, 2, 6, 7, 100])
def test_pieces_are_the_whole_and_no_larger(step, monkeypatch, most):
    folder, values = step
    monkeypatch.setattr(arrays, "PIECE", most)
    for name, value in values.items():
        found, seen = np.zeros_like(value), np.zeros(value.shape, int)
        for where, piece in pieces(folder, f"params/{name}"):
            assert piece.size <= most
            found[where] = piece
            seen[where] += 1
        np.testing.assert_array_equal(found, value)
        assert (seen == 1).all()


def test_another_type_is_the_nearest_value(step, tmp_path, monkeypatch):
    folder, values = step
    monkeypatch.setattr(arrays, "PIECE", 4)
    for name, value in values.items():
        convert(folder, f"params/{name}", tmp_path, "bfloat16")
        found = np.zeros(value.shape, ml_dtypes.bfloat16)
        for where, piece in pieces(tmp_path, f"params/{name}"):
            assert piece.dtype == ml_dtypes.bfloat16
            found[where] = piece
        np.testing.assert_array_equal(found, value.astype(ml_dtypes.bfloat16))


@pytest.mark.parametrize("text", [None, "", "{", "[]", "{}", '{"zarr_format": 3}'])
def test_broken_metadata_is_told(tmp_path, text):
    (tmp_path / "step" / "params" / "w").mkdir(parents=True)
    if text is not None:
        (tmp_path / "step" / "params" / "w" / "zarr.json").write_text(text)
    with pytest.raises(BadInput, match=r"params/w: can't be read; python -m gshardx.checkpoint verify says why"):
        convert(tmp_path / "step", "params/w", tmp_path / "target", "bfloat16")


def test_a_full_disk_is_told(tmp_path):
    store = CheckpointStore(tmp_path / "checkpoints", every=1, keep=1)
    store.save(1, {"params": {"w": jax.random.normal(jax.random.key(0), 1 << 15)}})
    store.close()
    with (
        small_disk(tmp_path / "disk", "32k") as disk,
        pytest.raises(BadInput, match="params/w: can't be written; is there room"),
    ):
        convert(tmp_path / "checkpoints" / "1", "params/w", disk, "bfloat16")


def test_what_is_not_there_is_told(tmp_path):
    with pytest.raises(BadInput, match="params/w: can't be read"):
        next(pieces(tmp_path, "params/w"))


def test_zeros_are_written_too(tmp_path):
    """TensorStore leaves out chunks that hold nothing else, and who restores a step takes that for damage."""
    store = CheckpointStore(tmp_path / "checkpoints", every=1, keep=1)
    store.save(1, {"params": {"zeros": jnp.zeros((4, 3))}})
    store.close()
    convert(tmp_path / "checkpoints" / "1", "params/zeros", tmp_path / "converted", "bfloat16")
    assert [path for path in (tmp_path / "converted" / "params" / "zeros" / "c").rglob("*") if path.is_file()]


def test_what_is_put_at_an_index_is_got_there(tmp_path):
    draw = np.random.default_rng(0)
    arrays.create(tmp_path, "w", (2, 3, 4), "bfloat16", (1, 1, 4))
    values = draw.normal(size=(2, 3, 4)).astype(ml_dtypes.bfloat16)
    with arrays.Writer(tmp_path) as writer:
        for at in np.ndindex(2, 3):
            writer.put("w", at, values[at])
    np.testing.assert_array_equal(arrays.get(tmp_path, "w", (1,)), values[1])
    np.testing.assert_array_equal(arrays.get(tmp_path, "w", ()), values)
