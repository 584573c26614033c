"""A directory that is there as a whole or not at all."""

import os

import pytest

from gshardx.checkpoint.beside import Part, continued_beside, fingerprint, written_beside
from gshardx.errors import BadInput


def test_it_has_its_name_once_all_is_written(tmp_path):
    with written_beside(tmp_path / "out", "--to", "writes it") as part:
        (part / "file").write_text("content")
        assert not (tmp_path / "out").exists()
    assert (tmp_path / "out" / "file").read_text() == "content"
    assert os.listdir(tmp_path) == ["out"]


def test_after_an_error_nothing_is_left(tmp_path):
    (tmp_path / "out").mkdir()

    def fails():
        with written_beside(tmp_path / "out", "--to", "writes it") as part:
            (part / "file").write_text("content")
            raise BadInput("no room")

    with pytest.raises(BadInput, match="no room"):
        fails()
    assert os.listdir(tmp_path) == ["out"]
    assert os.listdir(tmp_path / "out") == []


@pytest.mark.parametrize(("name", "said"), [("full", "not empty"), (".", "the current directory")])
def test_a_directory_that_may_not_be_replaced_is_refused(tmp_path, monkeypatch, name, said):
    (tmp_path / "here").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("content")
    monkeypatch.chdir(tmp_path / "here")
    target = tmp_path / "full" if name == "full" else tmp_path / "here" / name

    def opened():
        with written_beside(target, "--to", "writes it"):
            pass

    with pytest.raises(BadInput, match=said):
        opened()
    assert sorted(os.listdir(tmp_path)) == ["full", "here"]


def killed(place, *files, of="a"):
    """What a process leaves that is killed after it has finished some files and is at another."""
    part = Part(place, of)
    for name in files:
        (part.folder / name).write_text(name)
        part.finished(name)
    (part.folder / "under way").write_text("half")
    part.close()


def test_files_that_were_finished_stay(tmp_path):
    place = tmp_path / ".out.part"
    place.mkdir()
    killed(place, "one", "two words", "three")
    (place / "run" / "three").write_text("thr")
    with (place / "journal").open("a") as journal:
        journal.write("8 under w")  # cut off
    with continued_beside(tmp_path / "out", "--to", "writes it", "a") as part:
        found = {name: part.has(name) for name in ("one", "two words", "three", "under w", "under way")}
        (part.folder / "three").write_text("three")
        part.finished("three")
        assert part.held() == len("one" + "two words" + "three")
    assert found == {"one": True, "two words": True, "three": False, "under w": False, "under way": False}
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("of", ["b", None])
def test_a_part_of_something_else_is_removed(tmp_path, of):
    place = tmp_path / ".out.part"
    place.mkdir()
    killed(place, "one")
    with continued_beside(tmp_path / "out", "--to", "writes it", of) as part:
        assert not part.has("one")
        assert os.listdir(part.folder) == []


def test_a_fingerprint_sees_contents_and_sizes_and_options(tmp_path):
    file = tmp_path / "file"

    def of(content, **options):
        file.write_text(content)
        os.utime(file, (1, 1))
        return fingerprint([file], **options)

    found = [of("one"), of("two"), of("three"), of("one", dtype="float32"), of("one", dtype="bfloat16")]
    assert len(set(found)) == 5
    assert of("one") == found[0]
    os.utime(file, (2, 2))
    assert fingerprint([file]) != found[0]
