"""The manifest notices every changed byte, its own included."""

import json

import numpy as np
import pytest

from gshardx.checkpoint.manifest import NAME, damage, missized, read_manifest, write_manifest


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "params" / "w" / "c").mkdir(parents=True)
    (tmp_path / "params" / "w" / "c" / "0").write_bytes(bytes(range(256)))
    (tmp_path / "rng").mkdir()
    (tmp_path / "rng" / "key").write_bytes(b"k")
    (tmp_path / "empty").write_bytes(b"")
    write_manifest(tmp_path, {"params/w": ([2, 3], "float32")}, {"data": "d"})
    return tmp_path


def test_an_untouched_folder_is_good_and_its_facts_are_kept(folder):
    manifest = read_manifest(folder)
    assert damage(folder, manifest.checksum, manifest.files) is None
    assert missized(folder, manifest.files) is None
    assert manifest.arrays == {"params/w": ([2, 3], "float32")}
    assert manifest.extra == {"data": "d"}
    assert set(manifest.files) == {"params/w/c/0", "rng/key", "empty"}


def test_any_flipped_bit_of_the_manifest_makes_it_unreadable(folder):
    whole = (folder / NAME).read_bytes()
    draw = np.random.default_rng(0)
    for _ in range(300):
        data = bytearray(whole)
        data[draw.integers(len(data))] ^= 1 << draw.integers(8)
        (folder / NAME).write_bytes(bytes(data))
        assert read_manifest(folder) is None
    for length in (0, 1, len(whole) // 2, len(whole) - 1):
        (folder / NAME).write_bytes(whole[:length])
        assert read_manifest(folder) is None


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (lambda file: file.write_bytes(file.read_bytes()[:-1]), "params/w is damaged (params/w/c/0: 255 of 256 bytes)"),
        (lambda file: file.unlink(), "params/w is damaged (params/w/c/0 is missing)"),
        (lambda file: file.write_bytes(bytes(256)), "params/w is damaged (params/w/c/0: checksum differs)"),
    ],
)
def test_damage_names_the_array_and_the_file(folder, harm, said):
    harm(folder / "params" / "w" / "c" / "0")
    manifest = read_manifest(folder)
    assert damage(folder, manifest.checksum, manifest.files) == said
    assert missized(folder, manifest.files) == (None if "checksum" in said else said)
    assert damage(folder, manifest.checksum, manifest.below("rng")) is None


def test_files_of_no_item_belong_to_every_item(folder):
    assert set(read_manifest(folder).below("rng")) == {"rng/key", "empty"}


def test_a_manifest_is_a_line_of_json_and_a_line_of_checksum(folder):
    body, digest = (folder / NAME).read_text().splitlines()
    assert json.loads(body)["extra"] == {"data": "d"}
    assert len(digest) == 64
