"""From texts to a folder of token shards (gshardx/data/records.py), restartable at every shard.

``plan.json`` is written first and says what is being made of what; ``SHARD.json`` says that a shard is whole;
``index.json`` comes last and replaces both.
"""

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from gshardx.data.corpora import hash_of, held_out
from gshardx.data.documents import Reading, documents_in
from gshardx.data.encoding import Encoded, encoded
from gshardx.data.faults import Faults, Policy
from gshardx.data.files import digest_of, find_files
from gshardx.data.hub import is_stream, stream_documents
from gshardx.data.progress import Bar
from gshardx.data.records import FORMAT, INDEX, RECORD_TOKENS, TOKENIZER, Shard
from gshardx.data.shards import ShardWriter
from gshardx.data.tokenizer import Tokenizer, build_tokenizer, load_tokenizer, train_bpe
from gshardx.errors import BadInput
from gshardx.lock import hold

PLAN = "plan.json"
BPE_SAMPLE = 1 << 30
"""Bytes of text that a BPE is trained on at most; of more, documents are drawn by their hash."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """What the command was given; see ``python -m gshardx.data tokenize --help``."""

    path: list[str]
    out: str
    column: str = "text"
    tokenizer: str = "bpe"
    vocab_size: int = 1024
    validation_fraction: float = 0.05
    on_error: Policy = "fail"
    shard_tokens: int = 1 << 26
    workers: int = 1

    def __post_init__(self) -> None:
        for name in ("shard_tokens", "workers"):
            if getattr(self, name) < 1:
                raise BadInput(f"--{name} {getattr(self, name)}: must be 1 or more")


def tokenize(settings: Settings) -> None:
    """Make the folder ``settings.out``, or finish it.

    Raises:
        BadInput: nothing to read, something broken in it, a folder begun with other settings, or no room.
    """
    folder = Path(settings.out)
    with hold(folder, "--out", "writes it"):
        faults = Faults(settings.on_error)
        sources = _sources(settings, faults)
        plan = _plan(settings, sources)
        if not _begun(folder, plan):
            write_json(folder / PLAN, plan)
        if (folder / INDEX).exists():
            print(f"{folder}: done already")
            return
        tokenizer = _tokenizer(settings, sources, folder)
        shards = _finished(folder)
        with Bar("tokenize", sum(source["bytes"] for source in plan["sources"])) as bar:
            texts = _texts(sources, Reading(settings.column, faults, bar.advance))
            shards += _write_shards(settings, tokenizer, texts, folder, shards)
        _finish(folder, plan, tokenizer, shards, faults)


def _sources(settings: Settings, faults: Faults) -> list[Path | str]:
    """Files, and streams by their address."""
    found: list[Path | str] = []
    for path in settings.path:
        found += [path] if is_stream(path) else find_files(path, faults, "--path")
    return found


def _texts(sources: list[Path | str], reading: Reading) -> Iterator[str]:
    for source in sources:
        if isinstance(source, Path):
            yield from documents_in([source], reading)
        else:
            yield from (text for text in stream_documents(source, reading.column, reading.faults) if text.strip())


def _size(source: Path | str) -> int:
    return source.stat().st_size if isinstance(source, Path) else 0


def _plan(settings: Settings, sources: list[Path | str]) -> dict[str, Any]:
    """What decides every byte of the folder. Workers do not."""
    decides = dataclasses.asdict(settings)
    for name in ("out", "workers", "path"):
        del decides[name]
    with Bar("check files", sum(map(_size, sources))) as bar:
        listed = []
        for source in sources:
            digest = digest_of(source) if isinstance(source, Path) else ""
            listed.append({"file": str(source), "bytes": _size(source), "sha256": digest})
            bar.advance(_size(source))
    if settings.tokenizer not in ("bpe", "bytes"):
        decides["tokenizer_sha256"] = hashlib.sha256(load_tokenizer(Path(settings.tokenizer)).text.encode()).hexdigest()
    return {"format": FORMAT, **decides, "sources": listed}


def _begun(folder: Path, plan: dict[str, Any]) -> bool:
    """Whether the folder was begun by an earlier call.

    Raises:
        BadInput: with another plan.
    """
    for name in (INDEX, PLAN):
        if (folder / name).exists():
            try:
                found = json.loads((folder / name).read_text())
                before = found["plan"] if name == INDEX else found
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise BadInput(f"{folder / name}: damaged ({error}); delete {folder}") from error
            changed = [key for key in plan | before if plan.get(key) != before.get(key)]
            if changed:
                raise BadInput(
                    f"--out {folder}: was begun with other {', '.join(changed)}; use the old ones, delete it or choose "
                    f"another --out"
                )
            return True
    return False


def _tokenizer(settings: Settings, sources: list[Path | str], folder: Path) -> Tokenizer:
    """The folder's own, once it is there."""
    path = folder / TOKENIZER
    if path.exists():
        return load_tokenizer(path)
    if settings.tokenizer == "bpe":
        made = _trained(settings, sources)
    else:
        made = build_tokenizer(settings.tokenizer, settings.vocab_size, [])
    scratch = path.with_suffix(".part")
    made.save(scratch)
    scratch.replace(path)
    return made


def _trained(settings: Settings, sources: list[Path | str]) -> Tokenizer:
    """A BPE trained on what a run with the same validation_fraction trains on: two more readings of the text."""
    total = sum(map(_size, sources))
    with Bar("split", total) as bar:
        reading = Reading(settings.column, Faults(settings.on_error), bar.advance)
        found = [(hash_of(data), len(data)) for data in (text.encode() for text in _texts(sources, reading))]
    if not found:
        raise BadInput(f"--path {' '.join(settings.path)}: no text in it; give files with at least one document")
    hashes = np.asarray([one for one, _ in found], np.uint64)
    use = ~held_out(hashes, settings.validation_fraction)
    chance = BPE_SAMPLE / sum(size for (_, size), used in zip(found, use, strict=True) if used)
    if chance < 1:
        use &= (hashes & np.uint64(0xFFFFFFFF)) < np.uint64(chance * (1 << 32))
    with Bar("train tokenizer", total) as bar:
        texts = _texts(sources, Reading(settings.column, Faults(settings.on_error), bar.advance))
        return train_bpe(settings.vocab_size, (text for text, used in zip(texts, use, strict=False) if used))


def _finished(folder: Path) -> list[Shard]:
    shards: list[Shard] = []
    while (marker := folder / f"{len(shards):05d}.json").exists():
        shards.append(Shard(**json.loads(marker.read_text())))
    return shards


def _write_shards(
    settings: Settings, tokenizer: Tokenizer, texts: Iterable[str], folder: Path, done: list[Shard]
) -> Iterator[Shard]:
    """Write the shards that are missing; a shard ends with the document that fills it."""
    read = done[-1].read if done else 0
    documents = encoded(itertools.islice(texts, read, None), tokenizer, settings.workers)
    for number in itertools.count(len(done)):
        first = next(documents, None)
        if first is None:
            return
        writer = ShardWriter(folder, f"{number:05d}")
        for document in _until_full(itertools.chain([first], documents), settings.shard_tokens):
            writer.write(document)
            read += 1
        shard = writer.finish(read)
        write_json(folder / f"{shard.name}.json", dataclasses.asdict(shard))
        yield shard


def _until_full(documents: Iterable[Encoded], tokens: int) -> Iterator[Encoded]:
    for document in documents:
        yield document
        tokens -= len(document.ids)
        if tokens <= 0:
            return


def _finish(folder: Path, plan: dict[str, Any], tokenizer: Tokenizer, shards: list[Shard], faults: Faults) -> None:
    if not shards:
        broken = f" ({faults.summary})" if faults.count else ""
        raise BadInput(f"{plan['sources'][0]['file']}: no text in it; give files with at least one document{broken}")
    tokens = sum(shard.tokens for shard in shards)
    documents = sum(shard.documents for shard in shards)
    write_json(
        folder / INDEX,
        {
            "format": FORMAT,
            "tokenizer": hashlib.sha256(tokenizer.text.encode()).hexdigest(),
            "dtype": np.dtype(tokenizer.dtype).str,
            "record_tokens": RECORD_TOKENS,
            "documents": documents,
            "tokens": tokens,
            "skipped": faults.count,
            "shards": [dataclasses.asdict(shard) for shard in shards],
            "plan": plan,
        },
    )
    for leftover in [folder / PLAN, *(folder / f"{shard.name}.json" for shard in shards)]:
        leftover.unlink(missing_ok=True)
    if faults.count:
        print(faults.summary)
    print(
        f"{folder}: {documents:,} documents, {tokens:,} tokens, {len(shards)} shard(s); train with --data.path {folder}"
    )


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Whole or not at all."""
    scratch = path.with_suffix(".part")
    scratch.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    scratch.replace(path)
