"""Safetensors files, tensor by tensor: a header of JSON, then the numbers (huggingface.co/docs/safetensors).

Read with plain reads and not mapped into memory: mapped pages of a whole shard would count as this process's memory,
and the library's writer wants all tensors of a file at once.
"""

import contextlib
import dataclasses
import json
import os
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from gshardx.checkpoint.beside import Part
from gshardx.convert.ahead import read_ahead
from gshardx.convert.fp8 import PACKING as FP8
from gshardx.convert.mxfp4 import PACKING as MXFP4
from gshardx.convert.packing import Packing
from gshardx.errors import BadInput

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
DTYPES: dict[str, np.dtype[Any]] = {
    "F32": np.dtype(np.float32),
    "BF16": np.dtype(jnp.bfloat16),
    "F16": np.dtype(np.float16),
}
"""Types that weights may have; ours are the first two."""
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
PACKINGS = (MXFP4, FP8)
_PACKED = {one.type[0]: one.type[1] for one in PACKINGS}
AHEAD = 1 << 28
"""Bytes that the next tensors may take while one is written."""
_BLOCK = 256  # rows and columns; of 64 to 512, the fastest on x86
_LONGEST_HEADER = 100_000_000  # bytes; the library's own limit


class Tensor(NamedTuple):
    """Where a tensor's numbers lie, and what they are."""

    file: Path
    begin: int
    """Of the file, bytes."""
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    packing: Packing | None = None
    """Of one that is two in its file: dtype and shape are the decoded ones."""
    parts: "tuple[Tensor, ...]" = ()
    """These: numbers and scales."""

    @property
    def size(self) -> int:
        """Bytes, decoded."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize

    def read(self) -> np.ndarray:
        """All numbers; raises OSError or ValueError if they aren't there."""
        if self.packing is not None:
            return self.packing.decoded(*(part.read() for part in self.parts))
        flat = np.fromfile(self.file, self.dtype, int(np.prod(self.shape)), offset=self.begin)
        return flat.reshape(self.shape)


@dataclasses.dataclass(frozen=True)
class Tensors:
    """All tensors of a checkpoint's files, by name."""

    by_name: dict[str, Tensor]

    @property
    def planned(self) -> "list[Planned]":
        """To be written as they are."""
        return [Planned(name, tensor.dtype, tensor.shape) for name, tensor in self.by_name.items()]

    def read(self, name: str) -> np.ndarray:
        """The whole tensor.

        Raises:
            BadInput: its file can't be read any more.
        """
        tensor = self.by_name[name]
        try:
            return tensor.read()
        except (OSError, ValueError) as error:
            raise BadInput(f"{tensor.file}: {name} can't be read; did the file change?") from error


def open_tensors(folder: Path) -> Tensors:
    """Look at the headers of a folder's files, of several with an index or of one.

    Raises:
        BadInput: no such files, or one that is missing, truncated or no safetensors; or an index that doesn't suit.
    """
    if not (folder / INDEX).is_file():
        if not (folder / SINGLE).is_file():
            raise BadInput(f"{folder}: neither {SINGLE} nor {INDEX} there; give a directory with safetensors files")
        return Tensors(_decodable(dict(_header(folder / SINGLE))))
    places = read_index(folder)
    files = sorted(set(places.values()))
    found: dict[str, Tensor] = {}
    for file in files:
        if Path(file).name != file or not (folder / file).is_file():
            raise BadInput(f"{folder / file}: missing, but {INDEX} names it; fetch it again")
        found |= dict(_header(folder / file))
    for name, file in places.items():
        if name not in found or found[name].file != folder / file:
            raise BadInput(f"{folder / file}: has no tensor {name}, but {INDEX} says so; fetch both again")
    return Tensors(_decodable(found))


def _decodable(found: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors with each pair of numbers and scales as one."""
    whole = dict(found)
    for packing in PACKINGS:
        for name, scales in found.items():
            own = name.removesuffix(packing.scales)
            numbers = found.get(own + packing.numbers)
            if own == name or numbers is None or numbers.dtype != packing.type[1]:
                continue
            shape = packing.shape(numbers.shape, scales.shape)
            if shape is None:
                raise BadInput(
                    f"{scales.file}: {name} {list(scales.shape)} does not suit {own + packing.numbers} "
                    f"{list(numbers.shape)}; fetch both again"
                )
            del whole[name], whole[own + packing.numbers]
            parts = (numbers, scales)
            whole[own] = Tensor(numbers.file, numbers.begin, DTYPES["BF16"], shape, packing, parts)
    for name, tensor in whole.items():
        if tensor.dtype not in _NAMES:
            raise BadInput(f"{tensor.file}: {name} is of type {tensor.dtype.name}, without scales that are known here")
    return whole


def open_file(path: Path) -> Tensors:
    """Of one file, by itself.

    Raises:
        BadInput: it can't be read.
    """
    return Tensors(dict(_header(path)))


def read_index(folder: Path) -> dict[str, str]:
    """The file of each tensor.

    Raises:
        BadInput: the index is missing or damaged.
    """
    try:
        places = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
        return {str(name): str(file) for name, file in places.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadInput(f"{folder / INDEX}: not an index of safetensors files; fetch it again") from error


def _header(path: Path) -> Iterator[tuple[str, Tensor]]:
    """The tensors of one file; it must be as long as they say."""
    try:
        with path.open("rb") as file:
            start = file.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else _LONGEST_HEADER
            text = file.read(length) if length < _LONGEST_HEADER else b""
        about = json.loads(text)
        about.pop("__metadata__", None)
        spans = {name: (one["dtype"], tuple(one["shape"]), *one["data_offsets"]) for name, one in about.items()}
    except OSError as error:
        raise BadInput(f"{path}: can't be read ({error.strerror})") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadInput(f"{path}: not a safetensors file, or one cut off in its header; fetch it again") from error
    size = path.stat().st_size
    whole = 8 + length + max((end for *_, end in spans.values()), default=0)
    if size != whole:
        raise BadInput(f"{path}: {size:,} bytes where its header says {whole:,}; truncated? fetch it again")
    for name, (dtype, shape, begin, end) in spans.items():
        if dtype not in DTYPES | _PACKED:
            raise BadInput(f"{path}: {name} is of type {dtype}; only {', '.join(DTYPES)} can be read")
        tensor = Tensor(path, 8 + length + begin, (DTYPES | _PACKED)[dtype], shape)
        if end - begin != tensor.size:
            raise BadInput(f"{path}: {name} {list(shape)} of {dtype} takes {tensor.size:,} bytes, not {end - begin:,}")
        yield name, tensor


class Planned(NamedTuple):
    """A tensor that is to be written. ``learned``: whether it counts as parameters."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    learned: bool = True

    @property
    def size(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


def write_tensors(
    folder: Path,
    planned: Iterable[Planned],
    value: Callable[[str], np.ndarray],
    places: Mapping[str, str] | int,
    done: Callable[[int], Any],
    part: Part | None = None,
) -> None:
    """Write tensors into one file, or into several with an index.

    Args:
        folder: where.
        planned: which, in the order in which they fill files.
        value: of a tensor by its name; asked for once each, by another thread, which is ahead of the one that writes as
            long as all take no more than twice the largest tensor, or :data:`AHEAD` where that is more.
        places: each one's file; or the bytes of a file, which only a single tensor may exceed.
        done: called with the bytes of each.
        part: that ``folder`` is of; files that it has finished stay.
    """
    tensors = list(planned)
    if isinstance(places, int):
        places = _filled(tensors, places)
    files: dict[str, list[Planned]] = {}
    for tensor in tensors:
        files.setdefault(places[tensor.name], []).append(tensor)
    # The library's own order: wide types first, so that all lie at a multiple of their size.
    files = {name: sorted(held, key=lambda one: (-one.dtype.itemsize, one.name)) for name, held in files.items()}
    write_files(folder, files, value, done, part)
    if files.keys() != {SINGLE}:
        total = {
            "total_parameters": sum(int(np.prod(one.shape)) for one in tensors if one.learned),
            "total_size": sum(one.size for one in tensors),
        }
        text = json.dumps({"metadata": total, "weight_map": dict(sorted(places.items()))}, indent=2)
        (folder / INDEX).write_text(text + "\n", encoding="utf-8")


def write_files(
    folder: Path,
    files: Mapping[str, list[Planned]],
    value: Callable[[str], np.ndarray],
    done: Callable[[int], Any],
    part: Part | None = None,
) -> None:
    """Write tensors into the files given, in order; the other arguments are those of :func:`write_tensors`."""
    todo = {name: held for name, held in files.items() if part is None or not part.has(name)}
    done(sum(one.size for name, held in files.items() if name not in todo for one in held))
    values = read_ahead(
        (one for held in todo.values() for one in held),
        lambda one: value(one.name),
        lambda one, array: packed(array, one.dtype),
        lambda one: 2 * one.size,
        max([AHEAD, *(2 * one.size for held in files.values() for one in held)]),
    )
    with contextlib.closing(values), ThreadPoolExecutor(1, thread_name_prefix="to-disk") as beside:
        for name, held in todo.items():
            _write_file(folder / name, held, values, done, beside)
            if part is not None:
                part.finished(name)


def _filled(tensors: list[Planned], largest: int) -> dict[str, str]:
    """Files filled one after the other."""
    numbers: dict[str, int] = {}
    number = room = 0
    for one in tensors:
        if one.size > room:
            number, room = number + 1, largest
        room -= one.size
        numbers[one.name] = number
    if number == 1:
        return dict.fromkeys(numbers, SINGLE)
    return {name: f"model-{own:05d}-of-{number:05d}.safetensors" for name, own in numbers.items()}


def packed(array: np.ndarray, dtype: np.dtype[Any]) -> np.ndarray:
    """The same numbers without gaps and in order, as ``dtype``.

    Turned matrices are copied block by block, several times as fast as NumPy, which walks a whole column at a time.
    """
    array = array.astype(dtype, copy=False)
    if array.flags.c_contiguous or array.ndim < 2:
        return np.ascontiguousarray(array)
    bits = array.view(f"u{dtype.itemsize}")  # NumPy copies bfloat16 number by number
    out = np.empty(array.shape, bits.dtype)
    inner = int(np.argmin([abs(stride) for stride in array.strides]))
    if inner == array.ndim - 1:
        out[...] = bits
        return out.view(dtype)
    theirs, ours = np.moveaxis(bits, inner, -2), np.moveaxis(out, inner, -2)
    for i in range(0, theirs.shape[-2], _BLOCK):
        for j in range(0, theirs.shape[-1], _BLOCK):
            block = (..., slice(i, i + _BLOCK), slice(j, j + _BLOCK))
            ours[block] = theirs[block]
    return out.view(dtype)


def _write_file(
    path: Path,
    tensors: list[Planned],
    values: Iterator[np.ndarray],
    done: Callable[[int], Any],
    beside: ThreadPoolExecutor,
) -> None:
    """``values``: has the tensors' next; ``beside``: brings numbers to the disk while others are read."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for one in tensors:
        header[one.name] = {
            "dtype": _NAMES[one.dtype],
            "shape": list(one.shape),
            "data_offsets": [end, end + one.size],
        }
        end += one.size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the numbers start at a multiple of 8
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        under_way: Future[Any] = beside.submit(int)
        for one in tensors:
            array = next(values)
            assert array.shape == one.shape, (one, array.shape)
            file.write(array.reshape(-1).view(np.uint8).data)  # ndarray.tofile is silent if the disk is full at its end
            del array  # or it would be in memory beside the next one
            done(one.size)
            if under_way.done():
                under_way.result()
                under_way = beside.submit(os.fdatasync, file.fileno())
        file.flush()
        under_way.result()
        os.fsync(file.fileno())
