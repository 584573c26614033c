"""API keys in a file: one a line, alone or as ``name: key``; empty lines and lines that begin with # mean nothing."""

import hashlib
import hmac
import logging
import os
import re
from pathlib import Path
from time import monotonic
from typing import NamedTuple

from gshardx.errors import BadInput

MIN_LENGTH = 16
"""Characters of a key."""
CHECK_SECONDS = 1.0
"""Between looks at whether the file has changed."""
_MEND = 'make one by: python -c "import secrets; print(secrets.token_urlsafe(32))"'
_LINE = re.compile(r"(?:(?P<name>[^\s:]+):\s+)?(?P<key>[^\s:]+)")
_log = logging.getLogger("gshardx.server")


class _Known(NamedTuple):
    """What a file held. stamp: changes whenever the file does; None where there is none. owners: name and key's digest,
    one a key."""

    stamp: tuple[int, ...] | None
    owners: tuple[tuple[str, bytes], ...]


class Keys:
    """Who may come in. The file is followed: a key that is removed from it is refused a second later.

    A file that can't be used any more lets nobody in, and is a line in the log.

    Raises:
        BadInput: the file can't be read, holds no key, or a line is no key.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._known = _Known(_stamp(path), _owners(path))
        self._looked = monotonic()

    def owner(self, given: str | None) -> str | None:
        """The name of the key ``given``, by default ``key-<line>``; None where it is no key.

        How long this takes says nothing of the keys but their number.
        """
        self._follow()
        if given is None:
            return None
        digest, found = _digest(given), None
        for name, known in self._known.owners:
            if hmac.compare_digest(known, digest):
                found = name
        return found

    def _follow(self) -> None:
        now = monotonic()
        if now - self._looked < CHECK_SECONDS:
            return
        self._looked = now
        stamp = _stamp(self._path)
        if stamp == self._known.stamp:
            return
        try:
            self._known = _Known(stamp, _owners(self._path))
            _log.info("%s: read again, %d keys", self._path, len(self._known.owners))
        except BadInput as error:
            self._known = _Known(stamp, ())
            _log.error("no API key is accepted: %s", error)


def _stamp(path: Path) -> tuple[int, ...] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def _owners(path: Path) -> tuple[tuple[str, bytes], ...]:
    try:
        with path.open(encoding="utf-8") as file:
            lines, mode = file.read().splitlines(), os.fstat(file.fileno()).st_mode
    except OSError as error:
        raise BadInput(f"{path}: can't read the API keys ({error.strerror}); give a file of one a line") from error
    except UnicodeDecodeError:
        raise BadInput(f"{path}: not UTF-8; give a file of one API key a line") from None  # it quotes the file
    owners: dict[bytes, tuple[str, int]] = {}
    for number, line in enumerate(map(str.strip, lines), 1):
        if not line or line.startswith("#"):
            continue
        found = _LINE.fullmatch(line)
        if found is None:
            raise BadInput(f"{path}, line {number}: neither a key nor 'name: key'; keys have no spaces and no colons")
        if len(found["key"]) < MIN_LENGTH:
            raise BadInput(f"{path}, line {number}: a key of less than {MIN_LENGTH} characters; {_MEND}")
        digest = _digest(found["key"])
        if digest in owners:
            raise BadInput(f"{path}, line {number}: the key of line {owners[digest][1]} again; remove one")
        owners[digest] = found["name"] or f"key-{number}", number
    if not owners:
        raise BadInput(f"{path}: no API keys in it; write one a line, {_MEND}")
    if mode & 0o077:
        _log.warning("%s: others than its owner may use it; run: chmod 600 %s", path, path)
    return tuple((name, digest) for digest, (name, _) in owners.items())


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode(errors="surrogatepass")).digest()
