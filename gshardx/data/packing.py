"""Which pieces share a sequence: first fit, and best fit with the longest first."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Int


class Packing(NamedTuple):
    row: Int[np.ndarray, "pieces"]
    """Of each piece."""
    rows: int


def first_fit(sizes: Int[np.ndarray, "pieces"], capacity: int) -> Packing:
    """Each piece, in order, into the first row that has room, or a new one. No size is above ``capacity``."""
    room = np.full(len(sizes), capacity)
    row = np.empty(len(sizes), np.int64)
    rows = 0
    for piece, size in enumerate(sizes.tolist()):
        # A whole row needs no search: most pieces of long documents are one.
        place = rows if size == capacity else int(np.argmax(room[: rows + 1] >= size))
        row[piece] = place
        room[place] -= size
        rows = max(rows, place + 1)
    return Packing(row, rows)


def best_fit(sizes: Int[np.ndarray, "pieces"], capacity: int) -> Packing:
    """Each piece, the longest first, into the fullest row that has room, or a new one (best fit decreasing)."""
    row = np.empty(len(sizes), np.int64)
    rows = 0
    open_rows: dict[int, list[int]] = {}  # room -> rows with just that much
    rooms = 0  # bit i is set where open_rows has room i: the lowest set bit is the fullest row
    for piece in np.argsort(-sizes, kind="stable").tolist():
        size = int(sizes[piece])
        enough = rooms >> size
        if enough:
            room = size + (enough & -enough).bit_length() - 1
            place = open_rows[room].pop()
            if not open_rows[room]:
                rooms &= ~(1 << room)
        else:
            room, place, rows = capacity, rows, rows + 1
        row[piece] = place
        left = room - size
        if left:
            open_rows.setdefault(left, []).append(place)
            rooms |= 1 << left
    return Packing(row, rows)
