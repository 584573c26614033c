"""Names of tokens, for byte-level tokenizers and others."""

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from gshardx.data.tokenizer import END, Tokenizer, build_tokenizer, train_bpe
from gshardx.infer.server.tokens import TokenTexts


@pytest.fixture(scope="module")
def bpe():
    return train_bpe(300, ["à la carte, s'il vous plaît ☃ " * 20])


def test_bytes_of_tokens_make_the_text(bpe):
    text = "à la carte ☃!"
    texts = TokenTexts(bpe)
    assert b"".join(texts.bytes(int(token)) for token in bpe.encode(text)) == text.encode()
    assert texts.text(bpe.end) == END


def test_a_part_of_a_character_is_written_as_openai_does():
    tokenizer = build_tokenizer("bytes", 0, [])
    texts = TokenTexts(tokenizer)
    assert [texts.text(int(token)) for token in tokenizer.encode("a☃")] == [
        "a", "bytes:\\xe2", "bytes:\\x98", "bytes:\\x83"
    ]  # fmt: skip


def test_a_token_past_the_tokenizers_vocabulary_is_empty(bpe):
    assert TokenTexts(bpe).bytes(bpe.vocab_size) == b""
    assert TokenTexts(bpe).text(bpe.vocab_size) == ""


def test_other_tokenizers_say_their_tokens_themselves():
    inner = tokenizers.Tokenizer(models.WordPiece({"[UNK]": 0, "to": 1, "##be": 2, END: 3}, unk_token="[UNK]"))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.Whitespace(), decoders.WordPiece()
    inner.add_special_tokens([END])
    assert TokenTexts(Tokenizer(inner, "words")).text(1) == "to"
