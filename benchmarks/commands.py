"""Commands whose last line is a measurement."""

import os
import subprocess
import tempfile
from collections.abc import Mapping

from report import NotMeasured


def last_line(command: list[str], environment: Mapping[str, str] | None = None) -> tuple[str, int]:
    """Run a command; the last line that it prints, and the most bytes that one process of it had resident.

    Raises:
        NotMeasured: it failed, with the last line of its complaint, or printed nothing.
    """
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = subprocess.Popen(command, stdout=out, stderr=err, env=environment)
        _, status, usage = os.wait4(process.pid, 0)  # of the process and those that it has waited for
        process.returncode = os.waitstatus_to_exitcode(status)
        printed, complaint = (lines_of(file) for file in (out, err))
    if process.returncode:
        printed = complaint or printed
    if process.returncode or not printed:
        raise NotMeasured(printed[-1][:200] if printed else f"{command[0]} printed nothing")
    return printed[-1], usage.ru_maxrss * 1024  # Linux counts in KiB


def lines_of(file: tempfile._TemporaryFileWrapper) -> list[str]:
    file.seek(0)
    return file.read().strip().splitlines()
