"""A grid of levels as a PNG inside the page: 200 windows of 64 experts in a few kilobytes, for each colour scheme."""

import base64
import struct
import zlib

import numpy as np
from numpy.typing import NDArray

from gshardx.report.read import Floats

LEVELS = 61
FULL = 4.0
"""Load over mean that has the last colour, as have greater ones."""
LIGHT = ("#0b3c7d", "#5b95cf", "#f3f3f0", "#ec9a4f", "#9c3a06")
DARK = ("#7fbcff", "#34608f", "#23272d", "#a5602a", "#ffb36b")
"""Evenly spaced from no load over balance to FULL. Blue and orange: told apart in every colour blindness."""


def levels(load: Floats) -> NDArray[np.uint8]:
    """Balance in the middle; below it linear down to no load, above it logarithmic up to FULL."""
    over = np.log(np.maximum(load, 1)) / np.log(FULL)
    place = np.clip(np.where(load < 1, load - 1, over), -1, 1)
    return np.round((place + 1) / 2 * (LEVELS - 1)).astype(np.uint8)


def picture(grid: NDArray[np.uint8], said: str) -> str:
    """HTML for levels [row, column], drawn as large as its frame; ``said``, escaped, instead of it."""
    light, dark = (f"data:image/png;base64,{base64.b64encode(png(grid, stops)).decode()}" for stops in (LIGHT, DARK))
    return (
        f'<picture><source media="(prefers-color-scheme: dark)" srcset="{dark}">'
        f'<img src="{light}" alt="{said}"></picture>'
    )


def png(grid: NDArray[np.uint8], stops: tuple[str, ...]) -> bytes:
    """Levels [row, column] in the colours between ``stops``."""
    height, width = grid.shape
    rows = np.zeros((height, width + 1), np.uint8)  # each begins with its filter: none
    rows[:, 1:] = grid
    header = struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0)
    parts = ((b"IHDR", header), (b"PLTE", palette(stops)), (b"IDAT", zlib.compress(rows.tobytes(), 9)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in parts
    )


def palette(stops: tuple[str, ...]) -> bytes:
    colours = np.array([[int(stop[i : i + 2], 16) for i in (1, 3, 5)] for stop in stops], np.float64)
    at, places = np.linspace(0, 1, LEVELS), np.linspace(0, 1, len(stops))
    channels = [np.interp(at, places, channel) for channel in colours.T]
    return np.round(np.stack(channels, axis=-1)).astype(np.uint8).tobytes()
