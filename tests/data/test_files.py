"""Which files a source names, and their bytes, compressed or not."""

import bz2
import gzip
import json
import lzma
import random

import pyarrow as pa
import pytest
from array_record.python.array_record_module import ArrayRecordWriter

from gshardx.data.documents import Reading, documents_in, read_documents
from gshardx.data.faults import Faults
from gshardx.data.files import find_files, kind_of, open_bytes
from gshardx.errors import BadInput

TEXTS = ["one\ntwo\n", "søvn 漢字", "x" * 200_000]


def zstd(data):
    return pa.Codec("zstd").compress(data, asbytes=True)


COMPRESS = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstd}


def jsonl(texts):
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


@pytest.mark.parametrize("suffix", COMPRESS)
def test_compressed_text_is_read_as_what_it_was(tmp_path, suffix):
    compress = COMPRESS[suffix]
    (tmp_path / f"a.jsonl{suffix}").write_bytes(compress(jsonl(TEXTS[:2])) + compress(jsonl(TEXTS[2:])))  # two members
    (tmp_path / f"b.txt{suffix}").write_bytes(compress(TEXTS[1].encode()))
    assert read_documents(str(tmp_path), "text") == [*TEXTS, TEXTS[1]]


@pytest.mark.parametrize(
    ("suffix", "harm"),
    # Frames of zstd need not carry a checksum.
    [(s, harm) for s in COMPRESS for harm in ("cut", "flipped", "other") if (s, harm) != (".zst", "flipped")],
)
def test_a_damaged_compressed_file_is_named_with_how_far_it_was_read(tmp_path, suffix, harm):
    file = tmp_path / f"a.jsonl{suffix}"
    noise = random.Random(0)
    whole = COMPRESS[suffix](jsonl("".join(noise.choices("abcdefgh ", k=400)) for _ in range(300)))
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 255
    file.write_bytes({"cut": whole[: len(whole) // 2], "flipped": bytes(flipped), "other": b"not compressed"}[harm])
    with pytest.raises(BadInput) as caught:
        read_documents(str(file), "text")
    assert str(caught.value).startswith(f"{file}")
    faults = Faults("skip")
    rest = list(documents_in([file], Reading(faults=faults)))
    assert faults.count >= 1
    assert str(file) in faults.summary
    assert len(rest) < 300


def test_the_bytes_read_are_those_on_the_disk(tmp_path):
    seen = []
    for name, data in (("a.txt", b"abc" * 10**6), ("a.txt.gz", gzip.compress(b"abc" * 10**6))):
        (tmp_path / name).write_bytes(data)
        with open_bytes(tmp_path / name, seen.append) as stream:
            assert b"".join(stream) == b"abc" * 10**6
        assert sum(seen) == len(data)
        seen.clear()


def test_kinds(tmp_path):
    names = {"a.jsonl": (".jsonl", ""), "a.jsonl.gz": (".jsonl", ".gz"), "a.b.txt.zst": (".txt", ".zst")}
    names |= dict.fromkeys(("a.gz", "a.parquet.gz", "a.csv", "a", "txt", "a.arrayrecord.xz"), ("", ""))
    for name, kind in names.items():
        assert kind_of(tmp_path / name) == kind, name


def test_array_records_of_text_are_documents(tmp_path):
    writer = ArrayRecordWriter(str(tmp_path / "a.arrayrecord"), "group_size:1")
    for text in (*TEXTS, ""):
        writer.write(text.encode())
    writer.write(b"\xff\xfe")
    writer.close()
    with pytest.raises(BadInput, match=r"a\.arrayrecord, record 4: byte 0 is not UTF-8; or use data\.on_error = skip"):
        read_documents(str(tmp_path), "text")
    faults = Faults("skip")
    assert read_documents(str(tmp_path), "text", faults) == TEXTS
    assert faults.count == 1
    (tmp_path / "a.arrayrecord").write_bytes(b"no")
    with pytest.raises(BadInput, match=r"a\.arrayrecord: can't be read \(not a readable ArrayRecord file"):
        read_documents(str(tmp_path), "text")


def test_a_missing_shard_is_named_and_may_be_skipped(tmp_path):
    for number in (0, 1, 2, 3, 4, 6, 7):
        (tmp_path / f"corpus-0000{number}-of-00008.txt").write_text(f"{number}")
    with pytest.raises(BadInput, match=r"1 of 8 shards of corpus-\*-of-\*\.txt are missing \(number 5\)"):
        find_files(str(tmp_path))
    faults = Faults("skip")
    assert len(find_files(str(tmp_path), faults)) == 7
    assert faults.count == 1
    assert len(find_files(f"{tmp_path}/*-0000[12]-of-*")) == 2  # a choice of some is a choice


def test_skipping_keeps_what_is_whole_and_counts_the_rest(tmp_path):
    lines = [b'{"text": "a"}', b"{", b'{"text": "\xff"}', b'{"text": 3}', b'{"body": "b"}', b'"b"', b'{"text": "c"}']
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    (tmp_path / "b.txt").write_bytes(b"fine \xff\n")
    (tmp_path / "c.parquet").write_bytes(b"PAR1")
    (tmp_path / "d.txt").write_text("d")
    faults = Faults("skip")
    assert read_documents(str(tmp_path), "text", faults) == ["a", "c", "d"]
    assert faults.count == 7
    assert faults.summary.startswith(f"data: skipped 7 broken: {tmp_path}/a.jsonl, line 2 (byte 14): not JSON")
    assert faults.summary.endswith("and 4 more")
    assert Faults("skip").summary == ""


def test_when_all_is_skipped_the_error_says_what_was(tmp_path):
    (tmp_path / "a.jsonl").write_text("{\n{\n")
    with pytest.raises(BadInput, match=r"no text in it; .* skipped 2 broken: .*a\.jsonl, line 1"):
        read_documents(str(tmp_path), "text", Faults("skip"))
