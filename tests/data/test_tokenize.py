"""The tokenize command and the folders that it writes: the same tokens as from the text, whatever interrupts it."""

import itertools
import json
import os
import pickle
import random
import shutil
import signal
import time

import numpy as np
import pytest

from gshardx.config import DataConfig
from gshardx.data import encoding, shards
from gshardx.data.command import main
from gshardx.data.corpora import whole_document
from gshardx.data.faults import Faults
from gshardx.data.pipeline import training_rows
from gshardx.data.records import RecordCorpus
from gshardx.data.tokenize import Settings, tokenize
from gshardx.data.tokenizer import load_tokenizer
from gshardx.errors import BadInput
from gshardx.lock import hold
from gshardx.train.text import read_text
from tests.train.processes import finish, start

WORDS = ["to", "be", "or", "not", "that", "is", "the", "question", "whether", "nobler"]


def write_corpus(folder, documents=60, files=3):
    draw = random.Random(0)
    texts = [" ".join(draw.choices(WORDS, k=draw.randrange(1, 200))) for _ in range(documents)]
    for number in range(files):
        with (folder / f"{number}.jsonl").open("w") as out:
            out.writelines(json.dumps({"text": text}) + "\n" for text in texts[number::files])
    return [text for number in range(files) for text in texts[number::files]]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    return folder, write_corpus(folder)


@pytest.fixture(autouse=True)
def _small_records(monkeypatch):
    monkeypatch.setattr(shards, "RECORD_TOKENS", 64)
    monkeypatch.setattr("gshardx.data.tokenize.RECORD_TOKENS", 64)


def tokenized(corpus, out, **settings):
    tokenize(Settings([str(corpus)], str(out), **{"vocab_size": 300, "shard_tokens": 500, **settings}))
    return out


@pytest.fixture(scope="module")
def made(corpus, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "RECORD_TOKENS", 64)
        patch.setattr("gshardx.data.tokenize.RECORD_TOKENS", 64)
        return tokenized(corpus[0], tmp_path_factory.mktemp("tokens") / "made")


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_every_document_is_there_with_its_length_and_hash(corpus, made):
    tokenizer, held = load_tokenizer(made / "tokenizer.json"), RecordCorpus(made, Faults())
    expected = tokenizer.encode_documents(corpus[1])
    assert held.lengths.tolist() == [len(ids) for ids in expected]
    assert held.sizes.tolist() == [len(text) for text in corpus[1]]
    assert len(json.loads((made / "index.json").read_text())["shards"]) > 3
    for number, ids in enumerate(expected):
        np.testing.assert_array_equal(whole_document(held, number, Faults()), ids)


def test_runs_inside_and_across_records_are_slices_of_the_document(corpus, made):
    held, draw = RecordCorpus(made, Faults()), random.Random(1)
    whole = [whole_document(held, number, Faults()) for number in range(len(held.lengths))]
    assert max(map(len, whole)) > 3 * 64
    documents = [draw.randrange(len(whole)) for _ in range(300)]
    starts = [draw.randrange(len(whole[number])) for number in documents]
    counts = [draw.randint(1, len(whole[n]) - start) for n, start in zip(documents, starts, strict=True)]
    read = held.read(*(np.asarray(one) for one in (documents, starts, counts)), Faults())
    expected = [whole[n][start : start + c] for n, start, c in zip(documents, starts, counts, strict=True)]
    np.testing.assert_array_equal(read.ids, np.concatenate(expected))


@pytest.mark.parametrize("packing", ["first_fit", "concatenate"])
def test_training_from_the_folder_is_training_from_the_text(corpus, made, packing):
    """The same split, tokenizer and batches, and the same held-out documents."""
    common = {"vocab_size": 300, "sequence_length": 32, "packing": packing}
    from_text = read_text(DataConfig(path=str(corpus[0]), **common), 3)
    from_folder = read_text(DataConfig(path=str(made), **common), 3)
    assert from_folder.tokenizer.text == from_text.tokenizer.text
    assert from_folder.held_out.sizes == from_text.held_out.sizes
    for ours, theirs in zip(from_folder.held_out.documents, from_text.held_out.documents, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    ours, theirs = (training_rows(text.blocks, 32, 4) for text in (from_folder, from_text))
    for _ in range(60):
        for (name, one), (_, other) in zip(next(ours).items(), next(theirs).items(), strict=True):
            np.testing.assert_array_equal(one, other, err_msg=name)


def test_the_same_command_again_does_nothing_and_another_is_refused(corpus, made, capsys):
    before = contents(made)
    tokenized(corpus[0], made)
    assert "done already" in capsys.readouterr().out
    assert contents(made) == before
    with pytest.raises(BadInput, match="was begun with other vocab_size, shard_tokens; use the old ones"):
        tokenized(corpus[0], made, vocab_size=301, shard_tokens=400)


@pytest.mark.parametrize("workers", [1, 2])
def test_stopped_anywhere_it_ends_with_the_same_bytes(corpus, made, tmp_path, monkeypatch, workers):
    """Each call stops at one shard more, as it is being written."""
    write = shards.ShardWriter.write
    for stop in range(1, 4):
        left = stop

        def limited(self, document, write=write):
            nonlocal left
            left -= self._records == 0
            if left < 0:
                raise KeyboardInterrupt
            write(self, document)

        monkeypatch.setattr(shards.ShardWriter, "write", limited)
        with pytest.raises(KeyboardInterrupt):
            tokenized(corpus[0], tmp_path / "out")
        assert len(list((tmp_path / "out").glob("0*.json"))) == stop * (stop + 1) // 2
        with pytest.raises(BadInput, match="tokenizing it was not finished; run the same tokenize command again"):
            read_text(DataConfig(path=str(tmp_path / "out")))
    monkeypatch.setattr(shards.ShardWriter, "write", write)
    monkeypatch.setattr(encoding, "_BATCH", 2000)
    tokenized(corpus[0], tmp_path / "out", workers=workers)
    assert contents(tmp_path / "out") == contents(made)


@pytest.mark.slow
def test_killed_at_random_moments_it_ends_with_the_same_bytes(tmp_path):
    """Real processes and SIGKILL."""
    (tmp_path / "texts").mkdir()
    write_corpus(tmp_path / "texts", documents=3000, files=5)
    flags = ["--tokenizer", "bytes", "--shard_tokens", "30000"]
    command = ["tokenize", "--path", "texts", *flags]
    finish(start(tmp_path, *command, "--out", "undisturbed", module="gshardx.data"))
    draw, kills = random.Random(2), 0
    while not (tmp_path / "out" / "index.json").exists():
        process = start(tmp_path, *command, "--out", "out", module="gshardx.data")
        wanted = len(list((tmp_path / "out").glob("0*.json"))) + draw.randrange(1, 12)
        while process.poll() is None and len(list((tmp_path / "out").glob("0*.json"))) < wanted:
            time.sleep(draw.random() * 0.01)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
        process.communicate()
    assert kills >= 2
    finish(start(tmp_path, *command, "--out", "out", module="gshardx.data"))  # it may have been killed just at the end
    assert {k: v for k, v in contents(tmp_path / "out").items() if k.endswith(("record", "documents"))} == {
        k: v for k, v in contents(tmp_path / "undisturbed").items() if k.endswith(("record", "documents"))
    }
    assert json.loads((tmp_path / "out/index.json").read_text()) == json.loads(
        (tmp_path / "undisturbed/index.json").read_text()
    )


@pytest.fixture
def harmed(made, tmp_path):
    return shutil.copytree(made, tmp_path / "harmed")


def complaint(folder):
    with pytest.raises(BadInput) as caught:
        read_text(DataConfig(path=str(folder), sequence_length=32))
    return str(caught.value)


def test_a_missing_shard_is_named_or_left_out_with_a_count(made, harmed):
    (harmed / "00001.arrayrecord").unlink()
    assert f"{harmed}/00001.arrayrecord: missing, and index.json lists it with" in complaint(harmed)
    text = read_text(DataConfig(path=str(harmed), sequence_length=32, on_error="skip"))
    assert text.skipped.startswith("data: skipped 1 broken: ")
    whole, left = RecordCorpus(made, Faults()), RecordCorpus(harmed, Faults("skip"))
    assert 0 < len(left.lengths) < len(whole.lengths)
    assert text.digest != read_text(DataConfig(path=str(made), sequence_length=32)).digest


def test_a_file_that_shrank_is_named(harmed):
    file = harmed / "00002.arrayrecord"
    size = file.stat().st_size
    os.truncate(file, size - 100)
    assert f"00002.arrayrecord: has {size - 100:,} bytes and index.json says {size:,}" in complaint(harmed)


def test_a_damaged_record_is_named_where_it_is_read_or_becomes_padding(harmed):
    for file in harmed.glob("*.arrayrecord"):
        data = bytearray(file.read_bytes())
        data[200] ^= 255  # in one of the first records
        file.write_bytes(data)
    config = DataConfig(path=str(harmed), sequence_length=32, on_error="skip")
    text = read_text(config)
    failing, skipping = (training_rows(text.blocks, 32, 4, on_error=policy) for policy in ("fail", "skip"))
    with pytest.raises(BadInput, match=r"arrayrecord, record \d+: .*restore the file; or use data.on_error = skip"):
        list(itertools.islice(failing, 500))
    rows = [next(skipping) for _ in range(100)]
    assert skipping.skipped > 0
    for row in rows:
        assert (row["weights"] == (row["segments"] > 0)).all()
        assert not row["tokens"][row["segments"] == 0].any()


def test_a_shard_whose_own_index_is_damaged_is_named_or_left_out(harmed):
    file = harmed / "00002.arrayrecord"
    data = bytearray(file.read_bytes())
    data[-65_536:] = bytes(65_536)
    file.write_bytes(data)
    assert "00002.arrayrecord: can't be read (not a readable ArrayRecord file: " in complaint(harmed)
    assert "skipped 1 broken" in read_text(DataConfig(path=str(harmed), sequence_length=32, on_error="skip")).skipped


def test_a_shard_that_goes_while_a_run_reads_is_named(harmed):
    text = read_text(DataConfig(path=str(harmed), sequence_length=32))
    for file in harmed.glob("*.arrayrecord"):
        file.unlink()
    for corpus in text.blocks._corpora:
        corpus._readers.clear()  # as in a worker, which opens its own
    with pytest.raises(BadInput, match=r"\.arrayrecord: can't be read \(.*; restore it; or use data.on_error = skip"):
        next(training_rows(text.blocks, 32, 4))


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"format": "other"}', b'{"format": "gshardx tokens 1"}'])
def test_a_damaged_index_is_named(harmed, content):
    (harmed / "index.json").write_bytes(content)
    assert f"{harmed}/index.json" in complaint(harmed)


def test_a_shard_is_no_source_of_text(made):
    assert f"a shard of tokens, not of text; give the folder {made}" in complaint(made / "00000.arrayrecord")


def test_a_reader_goes_to_a_worker_without_its_files(made):
    held = RecordCorpus(made, Faults())
    first = whole_document(held, 0, Faults())
    again = pickle.loads(pickle.dumps(held))
    np.testing.assert_array_equal(whole_document(again, 0, Faults()), first)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--path", "nowhere"], "--path nowhere: no such file"),
        (["--vocab_size", "9"], "data.vocab_size = 9: 256 bytes and the end token need 257 or more"),
        (["--workers", "0"], "--workers 0: must be 1 or more"),
        (["--workers", "many"], "argument --workers: invalid int value: 'many'"),
        (["--tokenizer", "nowhere.json"], "nowhere.json: can't read the tokenizer"),
        (["--on_error", "hope"], "argument --on_error: invalid choice: 'hope'"),
        (["--pathh", "x"], "unrecognized arguments: --pathh x"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_mistake_is_one_line(corpus, tmp_path, flags, said):
    with pytest.raises(BadInput) as caught:
        main(["tokenize", "--path", str(corpus[0]), "--out", str(tmp_path / "out"), *flags])
    assert said in str(caught.value)


def test_a_file_in_the_way_and_a_second_writer_are_named(corpus, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInput, match="file/out: can't be written"):
        tokenized(corpus[0], tmp_path / "file" / "out")
    with (
        hold(tmp_path / "out", "--out", "writes it"),
        pytest.raises(BadInput, match=r"--out .*/out: another process writes it"),
    ):
        tokenized(corpus[0], tmp_path / "out")


def test_a_broken_line_ends_it_with_its_place_or_is_counted_in_the_index(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "to be"}\n{\n{"text": "or not"}\n{"text": "to be or"}\n')
    with pytest.raises(BadInput, match=r"a\.jsonl, line 2 \(byte 18\): not JSON"):
        tokenized(tmp_path / "a.jsonl", tmp_path / "out")
    tokenized(tmp_path / "a.jsonl", tmp_path / "other", on_error="skip")
    index = json.loads((tmp_path / "other" / "index.json").read_text())
    assert (index["skipped"], index["documents"]) == (1, 3)
