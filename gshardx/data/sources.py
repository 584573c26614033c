"""The sources of a run: what data.path or data.mixture names, as corpora with one tokenizer, one split and shares."""

import dataclasses
import hashlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool

from gshardx.config import DataConfig
from gshardx.data.corpora import Chain, Corpus, MemoryCorpus, hashes_of, held_out, whole_document
from gshardx.data.documents import read_documents
from gshardx.data.faults import Faults
from gshardx.data.hub import is_stream
from gshardx.data.order import temperature_weights
from gshardx.data.records import TOKENIZER, RecordCorpus, is_tokenized
from gshardx.data.tokenizer import Tokenizer, build_tokenizer, load_tokenizer
from gshardx.errors import BadInput


class HeldOut(NamedTuple):
    """Documents that are not trained on: their tokens, the bytes of their texts, and the names of their sources."""

    documents: list[np.ndarray]
    sizes: list[int]
    sources: list[str]


@dataclasses.dataclass(frozen=True)
class Sources:
    """Corpora, which of their documents are held out, their shares of the training tokens, which sum to 1, and names.

    ``texts`` are the documents of all corpora in order, where all were read as text.
    """

    tokenizer: Tokenizer
    corpora: list[Corpus]
    held_out: list[Bool[np.ndarray, "documents"]]
    shares: list[float]
    names: list[str]
    texts: list[str]

    @property
    def digest(self) -> str:
        """Equal digests, equal tokens to train on."""
        digest = hashlib.sha256()
        for corpus, out, share in zip(self.corpora, self.held_out, self.shares, strict=True):
            digest.update(f"{corpus.digest} {share}".encode() + np.packbits(out).tobytes())
        return digest.hexdigest()

    def held_out_documents(self, faults: Faults) -> HeldOut:
        """One that is there twice counts once."""
        found, seen = HeldOut([], [], []), set()
        for corpus, out, source in zip(self.corpora, self.held_out, self.names, strict=True):
            for number in np.flatnonzero(out).tolist():
                name = int(corpus.hashes[number])
                ids = None if name in seen else whole_document(corpus, number, faults)
                if ids is not None:
                    seen.add(name)
                    found.documents.append(ids)
                    found.sizes.append(int(corpus.sizes[number]))
                    found.sources.append(source)
        return found


def open_sources(config: DataConfig, faults: Faults) -> Sources:
    """Read and tokenise texts; open tokenised folders.

    Raises:
        BadInput: nothing there, something broken, or sources with different tokenizers.
    """
    paths = [config.path] if isinstance(config.path, str) else list(config.path)
    for path in [*paths, *config.mixture]:
        if is_stream(path):
            raise BadInput(f"{path}: a stream can't be mixed; turn it into a folder by python -m gshardx.data tokenize")
    named = [[source] for source in config.mixture] or [paths]
    names = list(config.mixture) or [", ".join(paths)]
    where = "data.mixture" if config.mixture else "data.path ="
    parts = [[_open(path, config, faults, where) for path in paths] for paths in named]
    flat = [part for group in parts for part in group]
    hashes = [hashes_of(part.encoded) if isinstance(part, _Texts) else part.hashes for part in flat]
    out = np.split(
        held_out(np.concatenate(hashes), config.validation_fraction), np.cumsum([len(h) for h in hashes])[:-1]
    )
    texts = [text for part in flat if isinstance(part, _Texts) for text in part.texts]
    training = [
        text
        for part, held in zip(flat, out, strict=True)
        if isinstance(part, _Texts)
        for text, is_held in zip(part.texts, held.tolist(), strict=True)
        if not is_held
    ]
    tokenizer = _tokenizer([part.folder for part in flat if isinstance(part, RecordCorpus)], config, training)
    corpora: list[Corpus] = []
    masks, tokens = [], []
    for group in parts:
        made = [part.tokenized(tokenizer) if isinstance(part, _Texts) else part for part in group]
        corpora.append(made[0] if len(made) == 1 else Chain(made))
        masks.append(np.concatenate([out.pop(0) for _ in group]))
        tokens.append(int(corpora[-1].lengths[~masks[-1]].sum()))
    shares = temperature_weights(tokens, list(config.mixture.values()) or [1.0], config.temperature)
    whole = texts if all(isinstance(part, _Texts) for part in flat) else []
    return Sources(tokenizer, corpora, masks, shares, names, whole)


@dataclasses.dataclass(frozen=True)
class _Texts:
    """A source before it is tokenised."""

    texts: list[str]

    @property
    def encoded(self) -> list[bytes]:
        return [text.encode() for text in self.texts]

    def tokenized(self, tokenizer: Tokenizer) -> MemoryCorpus:
        return MemoryCorpus(tokenizer.encode_documents(self.texts), self.encoded)


def _open(path: str, config: DataConfig, faults: Faults, where: str) -> "_Texts | RecordCorpus":
    if is_tokenized(path):
        return RecordCorpus(Path(path), faults)
    return _Texts(read_documents(path, config.column, faults, where))


def known_tokenizer(config: DataConfig) -> str:
    """data.tokenizer, or the tokenizer.json of the first source that brings one. No text is read."""
    sources = list(config.mixture) or ([config.path] if isinstance(config.path, str) else config.path)
    return next((str(Path(path) / TOKENIZER) for path in sources if is_tokenized(path)), config.tokenizer)


def _tokenizer(folders: list[Path], config: DataConfig, training: list[str]) -> Tokenizer:
    """That of the tokenised folders, or the config's."""
    if not folders:
        return build_tokenizer(config.tokenizer, config.vocab_size, training)
    made = [load_tokenizer(folder / TOKENIZER) for folder in folders]
    for folder, other in zip(folders, made, strict=True):
        if other.text != made[0].text:
            raise BadInput(
                f"{folder}: was tokenized with another tokenizer than {folders[0]}; tokenize one of them again"
            )
    if config.tokenizer not in ("bpe", "bytes") and load_tokenizer(Path(config.tokenizer)).text != made[0].text:
        raise BadInput(
            f"data.tokenizer = {config.tokenizer}: {folders[0]} was tokenized with another; leave data.tokenizer out"
        )
    return made[0]
