"""Text to token ids and back, in the ecosystem's tokenizer.json format."""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from gshardx.errors import BadInput

END = "<|endoftext|>"
_AT_ONCE = 256
"""Documents in a call of the library."""
KNOWN_ENDS = (END, "<|end_of_text|>", "</s>", "<eos>", "[SEP]")


class Tokenizer:
    """A ``tokenizers.Tokenizer`` and its end-of-text token, which stands between documents.

    Special tokens written in a text are read as plain text: no document can end another.
    """

    def __init__(self, inner: tokenizers.Tokenizer, name: str) -> None:
        ends = [token for token in KNOWN_ENDS if inner.token_to_id(token) is not None]
        if not ends:
            raise BadInput(f"{name}: has no end-of-text token; add one of {', '.join(KNOWN_ENDS)}")
        inner.encode_special_tokens = True
        inner.no_truncation()
        inner.no_padding()
        self.inner = inner
        self.end = int(inner.get_vocab()[ends[0]])

    def __reduce__(self) -> tuple[Callable[[str], "Tokenizer"], tuple[str]]:
        return _from_text, (self.text,)

    @property
    def vocab_size(self) -> int:
        return int(self.inner.get_vocab_size())

    @property
    def dtype(self) -> type[np.uint16] | type[np.int32]:
        """The smallest type for its ids."""
        return np.uint16 if self.vocab_size <= 1 << 16 else np.int32

    @property
    def text(self) -> str:
        """The content of its tokenizer.json."""
        return str(self.inner.to_str())

    def encode(self, text: str) -> np.ndarray:
        """Ids of ``text``, int32, no special tokens added."""
        try:
            # Without offsets it is three times as fast, and unlike encode a batch lets other threads run.
            found = self.inner.encode_batch_fast([text], add_special_tokens=False)
            return np.asarray(found[0].ids, np.int32)
        except TypeError as error:  # lone surrogates: what Python makes of bytes that are not UTF-8
            raise BadInput(f"text {text[:40]!r}: not Unicode; give UTF-8") from error

    def encode_documents(self, texts: list[str]) -> list[np.ndarray]:
        """Ids of each document between two end tokens, so that its first token has something to follow.

        uint16 where the vocabulary allows, else int32.
        """
        # A batch at a time: the library keeps some hundred bytes a token until its ids have been taken.
        return [
            np.asarray([self.end, *one.ids, self.end], self.dtype)
            for first in range(0, len(texts), _AT_ONCE)
            for one in self.inner.encode_batch(texts[first : first + _AT_ONCE], add_special_tokens=False)
        ]

    def decode(self, ids: Iterable[int]) -> str:
        return str(self.inner.decode(list(ids), skip_special_tokens=True))

    def stream(self, ids: Iterable[int]) -> Iterator[str]:
        """:meth:`decode` piece by piece as ids arrive; a piece ends only at a whole character, but for the last."""
        stream, seen, given = decoders.DecodeStream(skip_special_tokens=True), [], 0
        for token in ids:
            seen.append(int(token))
            piece = stream.step(self.inner, seen[-1])
            if piece:
                given += len(piece)
                yield piece
        rest = self.decode(seen)[given:]
        if rest:
            yield rest

    def save(self, path: Path) -> None:
        path.write_text(self.text, encoding="utf-8")


def _from_text(text: str) -> Tokenizer:
    """In a worker, from another process's."""
    return Tokenizer(tokenizers.Tokenizer.from_str(text), "the tokenizer")


def load_tokenizer(path: Path) -> Tokenizer:
    """Read a tokenizer.json.

    Raises:
        BadInput: it is missing, damaged, or has no end-of-text token.
    """
    try:
        inner = tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BadInput(f"{path}: can't read the tokenizer ({error.strerror})") from error
    except Exception as error:  # tokenizers raises plain Exception
        reason = str(error).splitlines()[0][:120]
        raise BadInput(f"{path}: not a tokenizer.json, or a damaged one ({reason}); restore or retrain it") from error
    return Tokenizer(inner, str(path))


def build_tokenizer(kind: str, vocab_size: int, texts: list[str]) -> Tokenizer:
    """ "bpe" (trained on ``texts`` once, then cached by content), "bytes", or the path of a tokenizer.json."""
    if kind == "bytes":
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        return Tokenizer(_byte_level({char: i for i, char in enumerate(alphabet)}), "bytes")
    if kind == "bpe":
        return _trained(vocab_size, texts)
    return load_tokenizer(Path(kind))


def _byte_level(vocab: dict[str, int]) -> tokenizers.Tokenizer:
    inner = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([END])
    return inner


def _trained(vocab_size: int, texts: list[str]) -> Tokenizer:
    content = hashlib.sha256(json.dumps([tokenizers.__version__, vocab_size, texts]).encode()).hexdigest()
    cached = cache_dir() / "tokenizers" / f"bpe-{content[:32]}.json"
    if cached.exists():
        try:
            return load_tokenizer(cached)
        except BadInput:  # a damaged cache entry is made again
            cached.unlink()
    tokenizer = train_bpe(vocab_size, texts)
    try:
        cached.parent.mkdir(parents=True, exist_ok=True)
        scratch = cached.with_suffix(f".{os.getpid()}")
        tokenizer.save(scratch)
        scratch.replace(cached)
    except OSError:
        pass  # a cache that can't be written costs only time
    return tokenizer


def train_bpe(vocab_size: int, texts: Iterable[str]) -> Tokenizer:
    """A byte-level BPE of at most ``vocab_size`` tokens, the same each time."""
    inner = _byte_level({})
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(texts, trainer)
    return Tokenizer(inner, "bpe")


def cache_dir() -> Path:
    """$XDG_CACHE_HOME/gshardx, by default ~/.cache/gshardx."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gshardx"
