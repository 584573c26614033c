"""Hugging Face datasets as a source. The package is an extra; no hub is asked."""

import itertools
import json
import sys

import numpy as np
import pytest

from gshardx.config import DataConfig
from gshardx.data import stream
from gshardx.data.faults import Faults
from gshardx.data.hub import stream_documents
from gshardx.data.pipeline import training_rows
from gshardx.data.sources import open_sources
from gshardx.data.tokenize import Settings, tokenize
from gshardx.errors import BadInput
from gshardx.train.text import read_text

TEXTS = [f"document {number} " + "to be or not to be " * (number % 7) for number in range(300)]


@pytest.fixture
def url(tmp_path):
    pytest.importorskip("datasets")
    for part in range(2):
        (tmp_path / f"{part}.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in TEXTS[part::2]))
    return f"hf://json?data_files={tmp_path}/*.jsonl"


@pytest.fixture(autouse=True)
def _short_blocks(monkeypatch):
    monkeypatch.setattr(stream, "DOCUMENTS", 64)


def test_documents_come_in_order_from_any_start(url):
    everything = list(stream_documents(url, "text", Faults()))
    assert everything == TEXTS[0::2] + TEXTS[1::2]
    assert list(stream_documents(url, "text", Faults(), 100, 170)) == everything[100:170]


def config_of(url, **changed):
    return DataConfig(path=url, tokenizer="bytes", sequence_length=32, validation_fraction=0.1, **changed)


@pytest.mark.parametrize("packing", ["first_fit", "concatenate"])
def test_a_stream_is_trained_on_whole_and_goes_on_from_any_state(url, packing):
    text = read_text(config_of(url, packing=packing))
    rows = training_rows(text.blocks, 32, 4)
    batches, states, targets = [], [rows.get_state()], 0
    while rows.get_state()["epoch"] == 0:
        batches.append(next(rows))
        states.append(rows.get_state())
    held = {text.tokenizer.decode(ids) for ids in text.held_out.documents}
    assert 0 < len(held) < 60
    last = next(i for i, state in enumerate(states) if state["epoch"]) - 1
    targets = sum(int(batch["weights"].sum()) for batch in batches[:last])
    whole = sum(len(t.encode()) + 1 for t in TEXTS if t not in held)
    assert whole - 2 * 4 * 32 <= targets <= whole
    for at in (0, 3, len(batches) // 2, len(batches) - 2):
        fresh = training_rows(read_text(config_of(url, packing=packing)).blocks, 32, 4)
        fresh.set_state(json.loads(json.dumps(states[at])))
        for batch in batches[at : at + 3]:
            for name, array in next(fresh).items():
                np.testing.assert_array_equal(array, batch[name])


def test_what_is_held_out_is_never_trained_on(url):
    text = read_text(config_of(url))
    rows = training_rows(text.blocks, 32, 4)
    held = {text.tokenizer.decode(ids).split()[1] for ids in text.held_out.documents}
    seen = set()
    for batch in itertools.islice(rows, 200):
        for tokens, segments in zip(batch["tokens"], batch["segments"], strict=True):
            for number in range(1, segments.max() + 1):
                piece = text.tokenizer.decode(tokens[segments == number])
                seen |= {piece.split()[1]} if piece.startswith("document ") else set()
    assert seen == {str(number) for number in range(300)} - held


def test_a_stream_can_be_turned_into_a_folder(url, tmp_path):
    tokenize(Settings([url], str(tmp_path / "out"), tokenizer="bytes"))
    corpus = open_sources(DataConfig(path=str(tmp_path / "out")), Faults()).corpora[0]
    assert corpus.sizes.tolist() == [len(t.encode()) for t in TEXTS[0::2] + TEXTS[1::2]]


def test_what_goes_wrong_is_one_line(url, tmp_path):
    with pytest.raises(BadInput, match=r"hf://json.*, example 0: no text in column 'body' \(it has: text\)"):
        read_text(config_of(url, column="body"))
    with pytest.raises(BadInput, match=r"nowhere\.jsonl.*: can't be read at example 0 \("):
        read_text(config_of(f"hf://json?data_files={tmp_path}/nowhere.jsonl"))


def test_a_stream_cannot_be_mixed():
    with pytest.raises(BadInput, match="hf://json: a stream can't be mixed"):
        open_sources(DataConfig(mixture={"hf://json": 1.0, "b": 1.0}), Faults())


def test_without_the_package_the_error_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(BadInput, match=r"hf://json: needs the package datasets; pip install 'gshardx\[hf\]'"):
        read_text(DataConfig(path="hf://json"))
