"""The text of a run: where its training rows come from, and what is held out."""

import dataclasses

import numpy as np

from gshardx.config import DataConfig
from gshardx.data.blocks import Blocks, Mixture
from gshardx.data.corpora import MemoryCorpus
from gshardx.data.faults import Faults
from gshardx.data.hub import is_stream
from gshardx.data.sources import HeldOut, Sources, open_sources
from gshardx.data.stream import Stream, StreamBlocks
from gshardx.data.tokenizer import Tokenizer, build_tokenizer

XZ_AT_MOST = 8_000_000
"""Bytes of text up to which the xz comparison takes seconds, and the text is kept for it."""


@dataclasses.dataclass(frozen=True)
class Text:
    """Blocks of training rows, whole held-out documents as tokens, and the text of both where it is short."""

    tokenizer: Tokenizer
    blocks: Blocks
    held_out: HeldOut
    digest: str
    """Of the training tokens: equal digests, equal batches."""
    skipped: str = ""
    """What was left out, in one line."""
    training_documents: list[str] = dataclasses.field(default_factory=list)
    held_out_documents: list[str] = dataclasses.field(default_factory=list)


def read_text(config: DataConfig, seed: int = 0) -> Text:
    """Open what ``config`` names; see :mod:`gshardx.data.sources` for what is raised. ``seed``: of the order."""
    faults = Faults(config.on_error)
    if isinstance(config.path, str) and is_stream(config.path):
        return _read_stream(config, seed, faults)
    sources = open_sources(config, faults)
    training, kept = _short_texts(sources)
    return Text(
        tokenizer=sources.tokenizer,
        blocks=Mixture(sources.corpora, sources.held_out, sources.shares, config.sequence_length, config.packing, seed),
        held_out=sources.held_out_documents(faults),
        digest=sources.digest,
        skipped=faults.summary,
        training_documents=training,
        held_out_documents=kept,
    )


def _read_stream(config: DataConfig, seed: int, faults: Faults) -> Text:
    """A Hugging Face dataset: of its first documents some are held out, and train the BPE."""
    stream = Stream(str(config.path), config.column, config.validation_fraction, config.on_error)
    training, held_out = stream.head(faults)
    tokenizer = build_tokenizer(config.tokenizer, config.vocab_size, training)
    sizes = [len(text.encode()) for text in held_out]
    return Text(
        tokenizer=tokenizer,
        blocks=StreamBlocks(stream, tokenizer, config.sequence_length, config.packing, seed),
        held_out=HeldOut(tokenizer.encode_documents(held_out), sizes, [stream.url] * len(held_out)),
        digest=MemoryCorpus(tokenizer.encode_documents(training)).digest,
        skipped=faults.summary,
    )


def _short_texts(sources: Sources) -> tuple[list[str], list[str]]:
    """Training and held-out documents, if together they are short."""
    if sum(int(corpus.sizes.sum()) for corpus in sources.corpora) > XZ_AT_MOST:
        return [], []
    out = np.concatenate(sources.held_out)
    training = [text for text, held in zip(sources.texts, out, strict=False) if not held]
    return training, list(dict.fromkeys(text for text, held in zip(sources.texts, out, strict=False) if held))
