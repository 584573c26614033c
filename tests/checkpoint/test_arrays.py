"""Arrays piece by piece, against the whole."""

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from gshardx.checkpoint import arrays
from gshardx.checkpoint.arrays import convert, pieces
from gshardx.checkpoint.store import CheckpointStore
from gshardx.errors import BadInput

SHAPES = [(), (1,), (13,), (3, 5), (4, 1, 7), (2, 3, 2, 5)]


@pytest.fixture(scope="module")
def step(tmp_path_factory):
    """Arrays of all shapes, and what they hold."""
    draw, folder = np.random.default_rng(0), tmp_path_factory.mktemp("arrays") / "checkpoints"
    values = {str(number): draw.normal(size=shape).astype(np.float32) for number, shape in enumerate(SHAPES)}
    store = CheckpointStore(folder, every=1, keep=1)
    store.save(1, {"params": {name: jnp.asarray(value) for name, value in values.items()}}, force=True)
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


def test_what_is_not_there_is_told(tmp_path):
    with pytest.raises(BadInput, match="params/w: can't be read"):
        next(pieces(tmp_path, "params/w"))
