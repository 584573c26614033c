"""Hugging Face datasets, streamed: ``hf://NAME?split=train&...``. Needs the extra ``hf``."""

import itertools
import urllib.parse
from collections.abc import Iterator
from typing import Any

from gshardx.data.faults import Faults
from gshardx.errors import BadInput

SCHEME = "hf://"


def is_stream(path: str) -> bool:
    return path.startswith(SCHEME)


def stream_documents(url: str, column: str, faults: Faults, start: int = 0, stop: int | None = None) -> Iterator[str]:
    """Documents ``start`` to ``stop`` of a dataset, in its own order; what is broken is counted, and given as "".

    Args:
        url: hf://NAME?KEY=VALUE&...; the keys are those of ``datasets.load_dataset``: split (default train), name,
            data_files, data_dir, revision. NAME may also be json, parquet or text with data_files.
        column: that holds the text.
        faults: meets examples without text.
        start: examples to pass over.
        stop: where to end; None: at the dataset's end.

    Raises:
        BadInput: the package is missing, the dataset can't be opened or read, or a fault.
    """
    number = start
    try:
        for number, example in enumerate(_opened(url, start, stop), start):
            text = example.get(column)
            if isinstance(text, str):
                yield text
            else:
                faults.met(f"{url}, example {number}: no text in column {column!r} (it has: {', '.join(example)})")
                yield ""
    except (BadInput, GeneratorExit):
        raise
    except Exception as error:  # each storage raises its own
        raise BadInput(f"{url}: can't be read at example {number} ({_reason(error)})") from error


def _opened(url: str, start: int, stop: int | None) -> Iterator[dict[str, Any]]:
    try:
        import datasets
    except ImportError as error:
        raise BadInput(f"{url}: needs the package datasets; pip install 'gshardx[hf]'") from error
    name, _, query = url.removeprefix(SCHEME).partition("?")
    options = {"split": "train"} | dict(urllib.parse.parse_qsl(query))
    dataset = datasets.load_dataset(name, streaming=True, **options)
    return itertools.islice(iter(dataset.skip(start) if start else dataset), None if stop is None else stop - start)


def _reason(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
