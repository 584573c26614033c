"""Damage is found as an array is read, in the files that hold it."""

import numpy as np
import pytest

from gshardx.checkpoint.arrays import Writer, create
from gshardx.checkpoint.checked import Checked
from gshardx.checkpoint.manifest import read_manifest, write_manifest
from gshardx.checkpoint.places import Saved
from gshardx.errors import BadInput

VALUES = np.arange(24, dtype=np.float32).reshape(2, 3, 4)


def saved(run, chunk):
    folder = run / "checkpoints" / "0"
    create(folder, "params/w", VALUES.shape, "float32", chunk)
    with Writer(folder / "params") as writer:
        for layer in range(2):
            writer.put("w", (layer,), VALUES[layer])
    write_manifest(folder, {"params/w": (list(VALUES.shape), "float32")}, {})
    return Saved(run, 0, read_manifest(folder))


def spoil(path):
    content = bytearray(path.read_bytes())
    content[5] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("chunk", [[1, 3, 4], [1, 3, 2], [2, 3, 4], [2, 1, 4]], ids=str)
def test_an_index_is_read_as_it_was_written(tmp_path, chunk):
    step = Checked(saved(tmp_path, chunk), "params")
    for layer in (1, 0, 1):
        np.testing.assert_array_equal(step.get("params/w", (layer,)), VALUES[layer])


def test_files_of_other_indices_are_not_looked_at(tmp_path):
    step = saved(tmp_path, [1, 3, 2])
    spoil(tmp_path / "checkpoints" / "0" / "params" / "w" / "c" / "1" / "0" / "1")
    found = Checked(step, "params")
    np.testing.assert_array_equal(found.get("params/w", (0,)), VALUES[0])
    with pytest.raises(BadInput, match=r"params/w is damaged \(params/w/c/1/0/1: checksum differs\); choose another"):
        found.get("params/w", (1,))


def test_a_file_of_several_indices_is_checked_with_the_first(tmp_path):
    step = saved(tmp_path, [2, 1, 4])
    spoil(tmp_path / "checkpoints" / "0" / "params" / "w" / "c" / "0" / "2" / "0")
    with pytest.raises(BadInput, match="params/w is damaged"):
        Checked(step, "params").get("params/w", (0,))


def test_a_damaged_description_is_found_before_anything_is_read(tmp_path):
    step = saved(tmp_path, [1, 3, 4])
    spoil(tmp_path / "checkpoints" / "0" / "params" / "w" / "zarr.json")
    with pytest.raises(BadInput, match=r"zarr.json: checksum differs"):
        Checked(step, "params")
