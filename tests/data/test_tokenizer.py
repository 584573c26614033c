"""Text to ids and back: nothing is lost, nothing is special, and a damaged file is named."""

import hashlib

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import models, pre_tokenizers, trainers

from gshardx.data.tokenizer import END, KNOWN_ENDS, build_tokenizer, cache_dir, load_tokenizer
from gshardx.errors import BadInput

TEXTS = ["the cat sat on the mat", "der Käfer über dem Dach 漢字 🎉", f"not an end: {END}", "the cat the mat the hat\n"]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "gshardx"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        return {kind: build_tokenizer(kind, 300, TEXTS) for kind in ("bytes", "bpe")}


@pytest.fixture(params=["bytes", "bpe"])
def tokenizer(request, made):
    return made[request.param]


kinds = st.sampled_from(["bytes", "bpe"])
texts = st.text(max_size=60) | st.lists(st.sampled_from([*KNOWN_ENDS, "a", " ", "\r\n", "é", "🎉"])).map("".join)


@settings(max_examples=200, deadline=None)
@given(kind=kinds, text=texts)
def test_any_text_comes_back_whole_at_once_and_in_a_stream(made, kind, text):
    ids = made[kind].encode(text)
    assert ids.dtype == np.int32
    assert made[kind].decode(ids) == text
    assert "".join(made[kind].stream(ids)) == text
    assert made[kind].end not in ids


@settings(max_examples=200, deadline=None)
@given(kind=kinds, draw=st.lists(st.integers(0, 10_000), max_size=40))
def test_a_stream_of_any_ids_is_the_decode(made, kind, draw):
    ids = [number % made[kind].vocab_size for number in draw]
    assert "".join(made[kind].stream(ids)) == made[kind].decode(ids)


def test_a_stream_waits_for_the_whole_character(made):
    ids = made["bytes"].encode("a漢b")
    assert len(ids) == 5
    assert list(made["bytes"].stream(ids)) == ["a", "漢", "b"]
    assert list(made["bytes"].stream(ids[:3])) == ["a", "\ufffd"]


def test_a_stream_gives_each_piece_before_it_asks_for_the_next_id(made):
    asked = []

    def ids():
        for number in made["bytes"].encode("abc"):
            asked.append(number)
            yield number

    stream = made["bytes"].stream(ids())
    assert next(stream) == "a"
    assert len(asked) == 1


def test_the_end_token_is_one_of_its_own_and_decodes_to_nothing(tokenizer):
    assert 0 <= tokenizer.end < tokenizer.vocab_size
    assert tokenizer.decode([tokenizer.end, *tokenizer.encode("a"), tokenizer.end]) == "a"


def test_documents_stand_between_end_tokens(tokenizer):
    encoded = tokenizer.encode_documents(["ab", "", f"x{END}y"])
    assert [ids.dtype for ids in encoded] == [np.uint16] * 3
    for ids, text in zip(encoded, ["ab", "", f"x{END}y"], strict=True):
        assert ids[0] == ids[-1] == tokenizer.end
        assert tokenizer.end not in ids[1:-1]
        assert tokenizer.decode(ids[1:-1]) == text
        np.testing.assert_array_equal(ids[1:-1], tokenizer.encode(text))


def test_bytes_are_one_token_each(made):
    assert made["bytes"].vocab_size == 257
    assert len(made["bytes"].encode("aé🎉")) == 1 + 2 + 4


def test_bpe_learns_from_the_text_up_to_the_size_asked_for(made):
    assert 257 < made["bpe"].vocab_size <= 300
    assert len(made["bpe"].encode("the cat")) < len("the cat")


def test_a_saved_tokenizer_reads_the_same(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "tokenizer.json")
    again = load_tokenizer(tmp_path / "tokenizer.json")
    assert (again.text, again.end, again.vocab_size) == (tokenizer.text, tokenizer.end, tokenizer.vocab_size)
    np.testing.assert_array_equal(again.encode(f"a{END}b"), tokenizer.encode(f"a{END}b"))  # the end stays text
    assert build_tokenizer(str(tmp_path / "tokenizer.json"), 0, []).text == tokenizer.text


def test_training_gives_the_same_tokenizer_each_time(tmp_path, monkeypatch):
    made = []
    for name in ("first", "second"):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / name))
        made.append(build_tokenizer("bpe", 290, TEXTS).text)
    assert made[0] == made[1]


def test_the_second_training_is_read_from_the_cache(cache, monkeypatch):
    first = build_tokenizer("bpe", 290, TEXTS)
    assert cache_dir() == cache
    assert len(list(cache.rglob("*.json"))) == 1
    monkeypatch.setattr(trainers, "BpeTrainer", None)  # nothing can be trained any more
    assert build_tokenizer("bpe", 290, TEXTS).text == first.text
    for size, texts in ((291, TEXTS), (290, TEXTS[:2]), (290, TEXTS[::-1])):
        with pytest.raises(TypeError):  # another size or text is another entry
            build_tokenizer("bpe", size, texts)


@pytest.mark.parametrize("damage", [b"", b"{}", b"\xff\xfe", b'{"version": "1.0", "model"'])
def test_a_damaged_cache_entry_is_made_again(cache, damage):
    first = build_tokenizer("bpe", 290, TEXTS)
    (entry,) = cache.rglob("*.json")
    entry.write_bytes(damage)
    assert build_tokenizer("bpe", 290, TEXTS).text == first.text
    assert load_tokenizer(entry).text == first.text
    assert list(entry.parent.iterdir()) == [entry]  # no scratch files


def test_a_cache_that_cannot_be_written_costs_only_time(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert build_tokenizer("bpe", 290, TEXTS).vocab_size <= 290


def test_the_cache_is_below_home_unless_xdg_says_otherwise(tmp_path, monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_dir() == tmp_path / ".cache" / "gshardx"


@pytest.mark.parametrize("damage", [b"", b"{}", b"[1, 2]", b"text", b"\xff\xfe\x00", b'{"version": "1.0", "truncated'])
def test_a_damaged_tokenizer_is_named(tmp_path, damage):
    file = tmp_path / "tokenizer.json"
    file.write_bytes(damage)
    with pytest.raises(BadInput) as caught:
        load_tokenizer(file)
    assert str(file) in str(caught.value)
    assert "damaged" in str(caught.value)


def test_a_tokenizer_that_is_not_there_is_named(tmp_path):
    for path in (tmp_path / "none.json", tmp_path):
        with pytest.raises(BadInput, match="can't read the tokenizer") as caught:
            build_tokenizer(str(path), 1024, [])
        assert str(path) in str(caught.value)


def word_level(*words):
    inner = tokenizers.Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=words[0]))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return inner


def test_a_tokenizer_without_an_end_token_is_refused_with_the_ones_that_would_do(tmp_path):
    word_level("?", "a").save(str(tmp_path / "t.json"))
    with pytest.raises(BadInput) as caught:
        load_tokenizer(tmp_path / "t.json")
    assert str(tmp_path / "t.json") in str(caught.value)
    assert all(end in str(caught.value) for end in KNOWN_ENDS)


@pytest.mark.parametrize("end", KNOWN_ENDS)
def test_every_known_end_token_is_found(tmp_path, end):
    word_level("?", "a", end).save(str(tmp_path / "t.json"))
    assert load_tokenizer(tmp_path / "t.json").end == 2


def test_truncation_and_padding_of_a_foreign_tokenizer_are_not_applied(made, tmp_path):
    inner = tokenizers.Tokenizer.from_str(made["bytes"].text)
    inner.enable_truncation(4)
    inner.enable_padding()
    inner.save(str(tmp_path / "t.json"))
    tokenizer = load_tokenizer(tmp_path / "t.json")
    assert len(tokenizer.encode("abcdefgh")) == 8
    assert [len(ids) for ids in tokenizer.encode_documents(["abcdefgh", "ab"])] == [10, 4]


def test_text_that_is_not_unicode_is_bad_input(made):
    with pytest.raises(BadInput):
        made["bytes"].encode("a\udcffb")  # what Python makes of the byte ff in --prompt


def test_the_text_of_a_tokenizer_identifies_it(made):
    assert hashlib.sha256(made["bytes"].text.encode()).digest() != hashlib.sha256(made["bpe"].text.encode()).digest()
