"""A directory that is there as a whole or not at all, and that a killed process need not write twice."""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from gshardx import __version__
from gshardx.errors import BadInput
from gshardx.lock import hold

_JOURNAL = "journal"
_SMALL = 1 << 24  # bytes


class Part:
    """A directory that is being written: ``folder``, and which files of it are whole and on the disk.

    The journal beside it is a line that says what the directory is of, and one for each such file: bytes and path.
    Lines are added in order, so that one that a crash cut off is the last, and counts for nothing.

    Args:
        place: where both are.
        of: what decides the directory's content; that of another one is removed. None: that of any.
    """

    def __init__(self, place: Path, of: str | None) -> None:
        self.folder, self._journal = place / "run", place / _JOURNAL
        first, *lines = _lines(self._journal) or [""]
        if of is not None and first == of and self.folder.is_dir():
            self._finished = dict(_size_and_path(line) for line in lines if line)
        else:
            self._journal.unlink(missing_ok=True)  # before what it vouches for
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir()
            self._finished = {}
        # Written anew: behind a line that was cut off no other can be added.
        self._replace([of or "", *(f"{size} {path}" for path, size in self._finished.items())])
        self._out = self._journal.open("a", encoding="utf-8")

    def has(self, path: str) -> bool:
        """Whether the file at ``path``, below the folder, was finished and is still as long."""
        size = self._finished.get(path)
        return size is not None and _size(self.folder / path) == size

    def finished(self, path: str) -> None:
        """Say so of a file that is on the disk; called by one thread at a time."""
        self._finished[path] = size = (self.folder / path).stat().st_size
        self._out.write(f"{size} {path}\n")
        self._out.flush()

    def held(self) -> int:
        """Bytes of all files that were finished."""
        return sum(size for path, size in self._finished.items() if self.has(path))

    def close(self) -> None:
        self._out.close()

    def _replace(self, lines: list[str]) -> None:
        scratch = self._journal.with_name(f"{_JOURNAL}.new")
        scratch.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        scratch.replace(self._journal)


@contextlib.contextmanager
def continued_beside(target: Path, flag: str, does: str, of: str | None) -> Iterator[Part]:
    """A directory to write, beside ``target``, in .NAME.part; it gets its name once the block has ended well.

    The part of a killed or failed process is gone on with if it is ``of`` the same and any of its files was finished;
    else it is removed.

    Args:
        target: a directory that is empty or not there.
        flag, does: as for :func:`gshardx.lock.hold`.
        of: what decides the content, see :func:`fingerprint`; None: nothing is gone on with.

    Raises:
        BadInput: the target holds something, can't be written, or another process writes it.
    """
    whole = target.resolve()
    if whole.exists() and (not whole.is_dir() or any(whole.iterdir())):
        raise BadInput(f"{target}: not empty; give a directory that is not there")
    if whole == Path.cwd():  # it would be replaced under the user's feet
        raise BadInput(f"{target}: the current directory; give one that is not there")
    place = whole.with_name(f".{whole.name}.part")
    keep = False
    with hold(place, flag, does):
        try:
            part = Part(place, of)
            try:
                yield part
                part.folder.rename(whole)
            except BaseException:
                keep = part.held() > 0
                raise
            finally:
                part.close()
        except OSError as error:
            raise BadInput(f"{target}: can't be written ({error.strerror}){_more(keep)}") from error
        except BadInput as error:
            if not keep:
                raise
            raise BadInput(f"{error}{_more(keep)}") from error
        finally:
            if not keep:
                shutil.rmtree(place, ignore_errors=True)


@contextlib.contextmanager
def written_beside(target: Path, flag: str, does: str) -> Iterator[Path]:
    """As :func:`continued_beside`, for what is always written from the start: the part of a killed process is replaced
    by the next one."""
    with continued_beside(target, flag, does, None) as part:
        yield part.folder


def fingerprint(files: Iterable[Path], **options: object) -> str:
    """Of what something is made of: names, sizes, times and, of small files, contents; and options, which JSON can
    hold."""
    about: list[object] = [__version__, options]
    for path in sorted(files):
        stat = path.stat()
        content = hashlib.sha256(path.read_bytes()).hexdigest() if stat.st_size <= _SMALL else None
        about.append([path.name, stat.st_size, stat.st_mtime_ns, content])
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()


def to_disk(folder: Path) -> None:
    """Bring every file below a folder to the disk, and the names of the files."""
    for path in (folder, *folder.rglob("*")):
        file = os.open(path, os.O_RDONLY)
        try:
            os.fsync(file)
        finally:
            os.close(file)


def _more(keep: bool) -> str:
    return "; what is whole stays, and the same command goes on from there" if keep else ""


def _lines(path: Path) -> list[str]:
    """Those that end."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]
    except OSError:
        return []


def _size_and_path(line: str) -> tuple[str, int]:
    size, _, path = line.partition(" ")
    return path, int(size) if size.isdecimal() else -1


def _size(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() else None
