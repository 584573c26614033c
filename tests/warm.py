"""Commands as forks of a process that has imported JAX and ours: each is spared the 2 s that its imports take.

A command has its own process, memory, arguments, environment and exit all the same. What Python settles as it
starts, the seed of its hashes included, is the starter's: a run that others are compared with is started anew.
"""

import ctypes
import functools
import gc
import json
import os
import runpy
import socket
import subprocess
import sys
import warnings
from pathlib import Path

ROOT = Path(__file__).parent.parent
IMPORTED = ("gshardx.cli", "gshardx.train.loop", "gshardx.infer.engine")
_PR_SET_CHILD_SUBREAPER = 36
_LONGEST = 2**20


class Fork(subprocess.Popen):
    """``python ARGUMENTS`` (``-m MODULE`` or a file first) as a Popen, started by the starter of its environment."""

    def _execute_child(self, args, *rest):
        cwd, env, out, err = rest[4], rest[5], rest[12], rest[14]
        starter = _starter(tuple(sorted((k, v) for k, v in env.items() if k != "PYTEST_CURRENT_TEST")))
        request = json.dumps({"arguments": args, "cwd": str(cwd), "environment": env}).encode()
        socket.send_fds(starter, [request], [out, err])
        self.pid, self._child_created = int(starter.recv(64)), True
        os.close(out)
        os.close(err)


@functools.cache
def _starter(environment):
    """A socket to the process that forks for commands of this environment."""
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)  # who a starter's child leaves behind becomes ours to wait for
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    subprocess.Popen(
        [sys.executable, "-m", "tests.warm", str(theirs.fileno())],
        cwd=ROOT,
        env=dict(environment),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        pass_fds=[theirs.fileno()],
        start_new_session=True,
    )
    theirs.close()
    return ours


def next_command(requests):
    """Returns in a grandchild, with its request; in the starter itself never."""
    while True:
        message, files, *_ = socket.recv_fds(requests, _LONGEST, 2)
        if not message:
            os._exit(0)
        told, tell = os.pipe()
        between = os.fork()
        if between == 0:
            command = os.fork()
            if command == 0:
                os.close(told)
                os.close(tell)
                return json.loads(message), files
            os.write(tell, str(command).encode())
            os._exit(0)
        os.waitpid(between, 0)  # from here on the command is a child of whoever asked
        requests.send(os.read(told, 64))
        for file in (told, tell, *files):
            os.close(file)


def become(request, files):
    """What ``python`` does with its arguments."""
    for number, file in enumerate(files, 1):
        os.dup2(file, number)
        os.close(file)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["environment"])
    first, *rest = request["arguments"]
    if first == "-m":
        module, *rest = rest
        sys.argv, sys.path[0] = [module, *rest], os.getcwd()
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    else:
        sys.argv, sys.path[0] = [first, *rest], str(Path(first).parent)
        runpy.run_path(first, run_name="__main__")


if __name__ == "__main__":
    for name in IMPORTED:
        __import__(name)
    gc.freeze()
    with socket.socket(fileno=int(sys.argv[1])) as requests, warnings.catch_warnings(action="ignore"):
        found = next_command(requests)
    become(*found)
