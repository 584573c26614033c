"""One command in two processes that find each other on this machine."""

import re
import socket
import subprocess
import sys

from tests.children import PIPES, environment
from tests.warm import Fork


def free_port():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


def flags(process, port, processes=2):
    return ["--coordinator", f"127.0.0.1:{port}", "--num_processes", str(processes), "--process_id", str(process)]


def start_both(folder, *command, port=None, anew=False):
    """``python command ... --coordinator ...`` twice; with its imports done, or ``anew``."""
    port = port or free_port()
    python, start = ([sys.executable], subprocess.Popen) if anew else ([], Fork)
    return [
        start([*python, *command, *flags(process, port)], cwd=folder, env=environment(), **PIPES)
        for process in range(2)
    ]


def finish_both(processes, expected=0, limit=400):
    """Outputs and errors of both, without gloo's notices, once they have ended as expected."""
    try:
        ends = [process.communicate(timeout=limit) for process in processes]
    finally:
        for process in processes:
            process.kill()
    codes = [process.returncode for process in processes]
    assert codes == [expected] * 2, (codes, ends)
    return [tuple(map(without_notices, end)) for end in ends]


def without_notices(text):
    """``text`` without what gloo prints as devices connect: whole notices, and lines where threads have mixed them."""
    text = re.sub(r"\[Gloo\] Rank \d+ is connected to \d+ peer ranks\. [\w ]+: \d+\n", "", text)
    mixed = re.compile(r"\[Gloo\]|is connected to|peer ranks|^[\d\s]*$")
    return "".join(line for line in text.splitlines(keepends=True) if not mixed.search(line))
