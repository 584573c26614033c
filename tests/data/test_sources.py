"""Sources of a run: mixtures reach their shares, one tokenizer serves all, and contradictions are named."""

import json
import random
import shutil

import numpy as np
import pytest

from gshardx.config import Config, DataConfig
from gshardx.data.corpora import hash_of
from gshardx.data.faults import Faults
from gshardx.data.pipeline import training_rows
from gshardx.data.sources import known_tokenizer, open_sources
from gshardx.data.tokenize import Settings, tokenize
from gshardx.errors import BadInput
from gshardx.plan.program import vocabulary
from gshardx.train.text import read_text


def write(file, letters, documents, longest, seed=0):
    """Documents of these letters alone, so that a byte tells its source."""
    draw = random.Random(seed)
    with file.open("w") as out:
        for _ in range(documents):
            out.write(json.dumps({"text": "".join(draw.choices(letters, k=draw.randint(1, longest)))}) + "\n")
    return str(file)


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    return {
        "small": write(folder / "small.jsonl", "abc", 40, 30),
        "middle": write(folder / "middle.jsonl", "ghi", 80, 200),
        "large": write(folder / "large.jsonl", "xyz", 300, 400),
    }


def shares_of(config, batches=150):
    """Of the tokens of a run's first rows, by the letters that they are."""
    text = read_text(config)
    rows = training_rows(text.blocks, config.sequence_length, 8)
    counts = np.zeros(3)
    vocabulary = {text.tokenizer.decode([i]): i for i in range(text.tokenizer.vocab_size)}
    for _ in range(batches):
        batch = next(rows)
        tokens = batch["tokens"][batch["segments"] > 0]
        counts += [
            np.isin(tokens, [vocabulary[letter] for letter in letters]).sum() for letters in ("abc", "ghi", "xyz")
        ]
    return counts / counts.sum()


@pytest.mark.parametrize("packing", ["first_fit", "best_fit", "concatenate"])
def test_a_mixture_reaches_its_shares_of_tokens_however_long_documents_are(texts, packing):
    mixture = {texts["small"]: 1.0, texts["middle"]: 3.0, texts["large"]: 6.0}
    found = shares_of(DataConfig(mixture=mixture, tokenizer="bytes", sequence_length=32, packing=packing))
    np.testing.assert_allclose(found, [0.1, 0.3, 0.6], atol=0.01)


def test_a_temperature_evens_out_sizes(texts):
    mixture = {texts[name]: 1.0 for name in ("small", "middle", "large")}
    sizes = []
    for path in mixture:
        sources = open_sources(DataConfig(path=path, tokenizer="bytes"), Faults())
        sizes.append(int(sources.corpora[0].lengths[~sources.held_out[0]].sum()))
    natural = shares_of(DataConfig(mixture=mixture, temperature=1.0, tokenizer="bytes", sequence_length=32))
    np.testing.assert_allclose(natural, np.asarray(sizes) / sum(sizes), atol=0.02)
    hot = shares_of(DataConfig(mixture=mixture, temperature=5.0, tokenizer="bytes", sequence_length=32))
    expected = np.asarray(sizes) ** 0.2
    np.testing.assert_allclose(hot, expected / expected.sum(), atol=0.02)


def test_a_list_of_paths_is_one_source(texts):
    paths = [texts["small"], texts["large"]]
    sources = open_sources(DataConfig(path=paths, tokenizer="bytes"), Faults())
    assert len(sources.corpora) == 1
    assert len(sources.corpora[0].lengths) == 340
    assert sources.shares == [1.0]


def test_a_document_of_two_sources_is_held_out_of_both(tmp_path, texts):
    """Or a run would be scored on what it has trained on."""
    shutil.copy(texts["middle"], tmp_path / "again.jsonl")
    mixture = {texts["middle"]: 1.0, str(tmp_path / "again.jsonl"): 1.0}
    sources = open_sources(DataConfig(mixture=mixture, tokenizer="bytes", validation_fraction=0.3), Faults())
    np.testing.assert_array_equal(*sources.held_out)
    documents, sizes, names = sources.held_out_documents(Faults())
    assert len(documents) == sources.held_out[0].sum() > 10
    assert sizes == [len(ids) - 2 for ids in documents]
    assert set(names) == {texts["middle"]}


def test_the_tokenizer_is_trained_on_training_text_alone(tmp_path):
    lines = [f"{'ab' * 50} {number}" for number in range(40)]
    out = min(lines, key=lambda text: hash_of(text.encode()))
    secret = next(
        f"{'qz' * 50} {n}" for n in range(10**4) if hash_of(f"{'qz' * 50} {n}".encode()) < hash_of(out.encode())
    )
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in [*lines, secret]))
    sources = open_sources(DataConfig(path=str(tmp_path), vocab_size=300, validation_fraction=0.02), Faults())
    assert "qz" not in sources.tokenizer.inner.get_vocab()
    assert "ab" in sources.tokenizer.inner.get_vocab()


def tokenized(path, out, **settings):
    tokenize(Settings([path], str(out), **settings))
    return str(out)


def test_a_tokenized_folder_brings_its_tokenizer(texts, tmp_path, monkeypatch):
    folder = tokenized(texts["middle"], tmp_path / "bytes", tokenizer="bytes")
    mixed = open_sources(DataConfig(mixture={folder: 1.0, texts["small"]: 1.0}), Faults())
    assert mixed.tokenizer.vocab_size == 257
    assert mixed.corpora[1].lengths.max() > 20  # of bytes, not of a BPE
    assert mixed.texts == []
    config = DataConfig(path=folder, vocab_size=4096)
    assert known_tokenizer(config) == f"{folder}/tokenizer.json"
    assert known_tokenizer(DataConfig(path=texts["small"])) == "bpe"
    assert vocabulary(Config(data=config)) == 257

    other = tokenized(texts["large"], tmp_path / "bpe", vocab_size=300)
    with pytest.raises(BadInput, match=rf"{other}: was tokenized with another tokenizer than {folder}"):
        open_sources(DataConfig(mixture={folder: 1.0, other: 1.0}), Faults())
    with pytest.raises(BadInput, match=r"was tokenized with another; leave data.tokenizer out"):
        open_sources(DataConfig(path=folder, tokenizer=f"{other}/tokenizer.json"), Faults())
    assert open_sources(DataConfig(path=folder, tokenizer=f"{folder}/tokenizer.json"), Faults()).texts == []


def test_digests_tell_what_is_trained_on(texts):
    def digest(**changed):
        config = {"mixture": {texts["small"]: 1.0, texts["middle"]: 1.0}, "tokenizer": "bytes", **changed}
        return open_sources(DataConfig(**config), Faults()).digest

    digests = [
        digest(),
        digest(mixture={texts["small"]: 1.0, texts["middle"]: 2.0}),
        digest(temperature=5.0),
        digest(validation_fraction=0.2),
        digest(mixture={texts["middle"]: 1.0, texts["small"]: 1.0}),
    ]
    assert len(set(digests)) == len(digests)
    assert digest() == digests[0]


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"path": "a", "mixture": {"b": 1.0}}, "data.path = a and data.mixture both say what to read; use one of them"),
        ({"path": []}, r"data.path = \[\]: name at least one source"),
        ({"temperature": 5.0}, "data.temperature = 5.0 weighs the sources of data.mixture; give some"),
        ({"temperature": 0.0, "mixture": {"a": 1.0}}, "data.temperature = 0.0: must be above 0"),
        ({"mixture": {"a": -1.0}}, "data.mixture a: -1.0: must be above 0 and finite; leave a source out instead"),
        ({"workers": -1}, "data.workers = -1: must be 0 or more"),
        ({"prefetch": -1}, "data.prefetch = -1: must be 0 or more"),
    ],
)
def test_contradictions_are_named(changed, said):
    with pytest.raises(BadInput, match=said):
        DataConfig(**changed)


def test_a_source_that_is_not_there_is_named_by_its_key(texts):
    with pytest.raises(BadInput, match=r"data.mixture nowhere: no such file"):
        open_sources(DataConfig(mixture={texts["small"]: 1.0, "nowhere": 1.0}), Faults())


def test_text_shorter_than_a_sequence_names_a_length_that_works(tmp_path):
    write(tmp_path / "a.jsonl", "abcdefgh", 3, 6)
    for packing in ("first_fit", "concatenate"):
        with pytest.raises(
            BadInput, match=r"less than one sequence of 32 .* use data.sequence_length = (\d+)"
        ) as caught:
            read_text(DataConfig(path=str(tmp_path), tokenizer="bytes", sequence_length=32, packing=packing))
        proposed = int(str(caught.value).rsplit("= ", 1)[1])
        read_text(DataConfig(path=str(tmp_path), tokenizer="bytes", sequence_length=proposed, packing=packing))
