"""Corpora: runs of tokens are read wherever they lie, and held-out documents are chosen by their text alone."""

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gshardx.data.corpora import Chain, MemoryCorpus, hashes_of, held_out, runs
from gshardx.data.faults import Faults
from gshardx.errors import BadInput


def corpus_of(documents):
    return MemoryCorpus([np.asarray(ids, np.int32) for ids in documents], [str(ids).encode() for ids in documents])


def test_runs():
    assert runs(np.asarray([5, 0, 9]), np.asarray([2, 0, 3])).tolist() == [5, 6, 9, 10, 11]


documents = st.lists(st.lists(st.integers(0, 99_999), min_size=1, max_size=9), min_size=2, max_size=9)


@settings(max_examples=60, deadline=None)
@given(documents=documents, cut=st.integers(1, 8), data=st.data())
def test_runs_of_a_corpus_and_of_a_chain_are_slices_of_documents(documents, cut, data):
    whole = corpus_of(documents)
    chain = Chain([part for part in (corpus_of(documents[:cut]), corpus_of(documents[cut:])) if len(part.lengths)])
    places = data.draw(st.lists(st.integers(0, len(documents) - 1), min_size=1, max_size=9))
    starts = [data.draw(st.integers(0, len(documents[place]) - 1)) for place in places]
    counts = [data.draw(st.integers(1, len(documents[p]) - start)) for p, start in zip(places, starts, strict=True)]
    expected = [i for p, start, n in zip(places, starts, counts, strict=True) for i in documents[p][start : start + n]]
    for corpus in (whole, chain):
        read = corpus.read(np.asarray(places), np.asarray(starts), np.asarray(counts), Faults())
        assert read.ids.tolist() == expected
        assert not read.broken.any()
    for name in ("lengths", "sizes", "hashes"):
        np.testing.assert_array_equal(getattr(whole, name), getattr(chain, name))


def test_a_digest_tells_tokens_and_where_documents_end():
    digests = {
        corpus_of(documents).digest for documents in ([[1, 2], [3]], [[1], [2, 3]], [[1, 2], [4]], [[3], [1, 2]])
    }
    assert len(digests) == 4
    assert corpus_of([[1, 2], [3]]).digest == corpus_of([[1, 2], [3]]).digest


def split_documents(texts, fraction):
    out = held_out(hashes_of([text.encode() for text in texts]), fraction)
    pairs = list(zip(texts, out.tolist(), strict=True))
    return [text for text, held in pairs if not held], list(dict.fromkeys(text for text, held in pairs if held))


@settings(max_examples=100, deadline=None)
@given(
    texts=st.lists(st.text(min_size=1, max_size=5), min_size=2, max_size=30).filter(lambda texts: len(set(texts)) > 1),
    fraction=st.floats(1e-6, 1 - 1e-6),
    seed=st.integers(0, 99),
)
def test_a_split_loses_nothing_shares_nothing_and_depends_on_no_order(texts, fraction, seed):
    training, held_out = split_documents(texts, fraction)
    assert training
    assert held_out
    assert not set(training) & set(held_out)
    assert set(training) | set(held_out) == set(texts)
    assert len(held_out) == len(set(held_out))
    assert training == [text for text in texts if text in set(training)]  # in order, duplicates and all
    assert len(held_out) == pytest.approx(fraction * len(set(texts)), abs=1)
    shuffled = random.Random(seed).sample(texts, len(texts))
    assert set(split_documents(shuffled, fraction)[1]) == set(held_out)
    assert split_documents(texts, fraction) == (training, held_out)


def test_more_documents_move_few_across_the_split():
    texts = [f"document {i}" for i in range(1000)]
    before = set(split_documents(texts, 0.1)[1])
    after = set(split_documents([*texts, *[f"new {i}" for i in range(100)]], 0.1)[1])
    assert len(before & after) > 80


@pytest.mark.parametrize("texts", [["only"], ["same", "same", "same"]])
def test_one_document_cannot_be_split(texts):
    with pytest.raises(BadInput, match="at least two"):
        split_documents(texts, 0.5)
