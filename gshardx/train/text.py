"""The text of a run: read, split, tokenised, cut."""

import dataclasses
import hashlib

import numpy as np

from gshardx.config import DataConfig
from gshardx.data.documents import read_documents, split_documents
from gshardx.data.pipeline import cut
from gshardx.data.tokenizer import Tokenizer, build_tokenizer


@dataclasses.dataclass(frozen=True)
class Text:
    """Training pieces of at most a sequence of tokens, whole held-out documents as tokens, and the text of both."""

    tokenizer: Tokenizer
    training: list[np.ndarray]
    held_out: list[np.ndarray]
    training_documents: list[str]
    held_out_documents: list[str]

    @property
    def digest(self) -> str:
        """SHA-256 of the training tokens in order: equal digests, equal batches."""
        digest = hashlib.sha256()
        for piece in self.training:
            digest.update(piece.tobytes())
        return digest.hexdigest()

    @property
    def held_out_bytes(self) -> int:
        return sum(len(document.encode()) for document in self.held_out_documents)


def read_text(config: DataConfig) -> Text:
    """Read ``config.path``; see :mod:`gshardx.data` for what each part raises."""
    documents = read_documents(config.path, config.column)
    training, held_out = split_documents(documents, config.validation_fraction)
    tokenizer = build_tokenizer(config.tokenizer, config.vocab_size, training)
    return Text(
        tokenizer=tokenizer,
        training=cut(tokenizer.encode_documents(training), config.sequence_length),
        held_out=tokenizer.encode_documents(held_out),
        training_documents=training,
        held_out_documents=held_out,
    )
