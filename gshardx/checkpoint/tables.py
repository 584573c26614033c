"""Tables of what was saved."""

import math
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from gshardx.checkpoint.arrays import FLOATS, pieces
from gshardx.checkpoint.compare import Difference
from gshardx.checkpoint.manifest import NAME, SCORE, read_manifest
from gshardx.checkpoint.places import Saved, why_unread
from gshardx.checkpoint.store import step_folders

Row = Sequence[str]


def steps_table(checkpoints: Path) -> list[Row]:
    """Step, when it was saved, bytes, items, score (bits per byte) and state; no file of arrays is looked at."""
    rows: list[Row] = [("step", "saved", "bytes", "items", "score", "state")]
    for step in step_folders(checkpoints):
        folder = checkpoints / str(step)
        manifest = read_manifest(folder)
        if manifest is None:
            rows.append((str(step), "", "", "", "", why_unread(folder)))
            continue
        saved = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime((folder / NAME).stat().st_mtime))
        size = sum(size for size, _ in manifest.files.values())
        items = sorted({name.split("/")[0] for name in manifest.files if "/" in name})
        score = manifest.extra.get(SCORE)
        shown = "" if score is None else f"{score:.4f}"
        rows.append((str(step), saved, f"{size:,}", " ".join(items), shown, "finished"))
    return rows


def arrays_table(saved: Saved, item: str, values: bool) -> list[Row]:
    """Name, shape, type, entries and bytes on disk of each array of an item; with ``values`` also their root mean
    square, the largest, and how many are not finite."""
    head = ("array", "shape", "dtype", "entries", "bytes on disk")
    rows: list[Row] = [(*head, "rms", "largest", "not finite") if values else head]
    total = stored = 0
    for name, (shape, dtype) in sorted(saved.manifest.arrays.items()):
        if not name.startswith(f"{item}/"):
            continue
        size = sum(size for file, (size, _) in saved.manifest.files.items() if file.startswith(f"{name}/"))
        entries = math.prod(shape)
        total, stored = total + entries, stored + size
        row = (name.split("/", 1)[1], str(shape), dtype, f"{entries:,}", f"{size:,}")
        rows.append((*row, *_values(saved.folder, name, dtype)) if values else row)
    rows.append(("in all", "", "", f"{total:,}", f"{stored:,}", *([""] * 3 * values)))
    return rows


def _values(folder: Path, name: str, dtype: str) -> Row:
    if dtype not in FLOATS:
        return "", "", ""
    square, largest, entries, bad = 0.0, 0.0, 0, 0
    for _, part in pieces(folder, name):
        finite = np.isfinite(part)
        numbers = np.where(finite, part, 0).astype(np.float64)
        square, largest = square + float((numbers**2).sum()), max(largest, float(np.abs(numbers).max(initial=0)))
        entries, bad = entries + part.size, bad + int((~finite).sum())
    return f"{(square / max(1, entries - bad)) ** 0.5:.4g}", f"{largest:.4g}", f"{bad:,}"


def difference_row(one: Difference) -> Row:
    """Array, what differs, and how many entries by how much, where that can be said."""
    if one.gap is None:
        return one.array, one.about, "", "", ""
    return one.array, one.about, f"{one.gap.entries:,}", f"{one.gap.largest:.3g}", f"{one.gap.relative:.3g}"


def aligned(rows: Iterable[Row]) -> Iterator[str]:
    """Lines of columns; those of numbers are flush right."""
    kept = [list(row) for row in rows]
    widths = [max(map(len, column)) for column in zip(*kept, strict=True)]
    numbers = [all(_number(one) for one in column[1:]) for column in zip(*kept, strict=True)]
    for row in kept:
        cells = zip(row, widths, numbers, strict=True)
        yield "  ".join(one.rjust(width) if right else one.ljust(width) for one, width, right in cells).rstrip()


def _number(text: str) -> bool:
    return not text.strip("0123456789,.e+-")
