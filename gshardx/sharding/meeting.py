"""How the processes of one command find each other, before JAX starts."""

import argparse
import contextlib
import os
import socket
import time
from typing import Any, NamedTuple

import jax
from jax._src.clusters import ClusterEnv

from gshardx.errors import BadInput, OthersMissing
from gshardx.sharding.peers import Peers

HELP = """On several processes: under SLURM (srun), on TPU pods and Kubernetes JobSets and under Open MPI's mpirun each
finds the others by itself; elsewhere start the same command once a process with --coordinator HOST:PORT (of process 0)
--num_processes N --process_id I (0 to N - 1), and perhaps --coordinator_timeout SECONDS (default 300).
Where one is killed, the others name it and end with exit code 3."""
_REFUSAL, _MISSING = "gshardx: ", "gshardx, missing: "
_NEVER = 1 << 20  # seconds: Peers notices the dead in one, and the hanging are the watchdog's to judge
_FLAGS = {"coordinator": "HOST:PORT", "num_processes": "N", "process_id": "I", "coordinator_timeout": "SECONDS"}


class Meeting(NamedTuple):
    """Where processes meet; without a coordinator, where the cluster says, if there is one."""

    coordinator: str | None = None
    num_processes: int | None = None
    process_id: int | None = None
    timeout: int = 300


def take_flags(argv: list[str]) -> tuple[Meeting, list[str]]:
    """The flags of :data:`HELP`, and the rest of the command line.

    Raises:
        BadInput: one of three is missing, or a value is malformed or out of range.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for flag in _FLAGS:
        parser.add_argument(f"--{flag}")
    try:
        given, rest = parser.parse_known_args(argv)
    except argparse.ArgumentError as error:
        raise BadInput(f"{error.argument_name}: {error.message}; give it a value") from error
    flags = {name: value for name, value in vars(given).items() if value is not None}
    three = list(_FLAGS)[:3]
    missing = [f"--{name} {_FLAGS[name]}" for name in three if name not in flags]
    if missing and len(missing) < 3:
        present = ", ".join(f"--{name}" for name in three if name in flags)
        raise BadInput(f"{present}: give {' and '.join(missing)} too")
    timeout = _whole("coordinator_timeout", flags.get("coordinator_timeout", "300"), 1)
    if missing:
        return Meeting(timeout=timeout), rest
    address_of(flags["coordinator"])
    count = _whole("num_processes", flags["num_processes"], 1)
    return Meeting(flags["coordinator"], count, _whole("process_id", flags["process_id"], 0, count - 1), timeout), rest


def address_of(coordinator: str) -> tuple[str, int]:
    """Host and port of ``HOST:PORT`` (``[HOST]:PORT`` for IPv6).

    Raises:
        BadInput: it is not of that form.
    """
    host, _, port = coordinator.rpartition(":")
    bare = host.strip("[]")
    if not bare or (":" in bare and host == bare) or not port.isdecimal() or not 0 < int(port) < 1 << 16:
        raise BadInput(f"--coordinator {coordinator}: not HOST:PORT with a port of 1 to 65535, for example node0:8476")
    return bare, int(port)


def _whole(name: str, text: str, low: int, high: int | None = None) -> int:
    if not text.isdecimal() or int(text) < low or (high is not None and int(text) > high):
        until = f" to {high}" if high is not None else " or more"
        raise BadInput(f"--{name} {text}: must be a whole number, {low}{until}")
    return int(text)


def join(
    coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None, timeout: int = 300
) -> Peers:
    """Meet the other processes, before JAX first touches a device.

    Without arguments the cluster tells who they are, by JAX's own detection: TPU pods (GCE and GKE), Kubernetes Jobs
    and JobSets, SLURM steps, Open MPI. No cluster, or a cluster of one: nothing happens. CPU devices of different
    processes exchange data by gloo. What the processes do together belongs into the context of the result.

    Raises:
        OthersMissing: not all processes came within ``timeout`` seconds.
        BadInput: they contradict each other.
    """
    local_devices: Any = None
    if coordinator is None:
        try:
            coordinator, num_processes, process_id, local_devices = ClusterEnv.auto_detect_unset_distributed_params(
                None, None, None, None, None, timeout
            )
        except (RuntimeError, ValueError, OSError) as error:
            raise BadInput(f"the cluster does not say where its processes meet: {error}; give --coordinator") from error
    if coordinator is None or num_processes is None or process_id is None or num_processes == 1:
        return Peers()
    lines = _meet(coordinator, num_processes, process_id, timeout)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # Its handler would swallow SIGTERM from here on; gshardx.train has its own.
    jax.config.update("jax_enable_preemption_service", False)
    jax.distributed.initialize(
        coordinator,
        num_processes,
        process_id,
        local_devices,
        cluster_detection_method="deactivate",
        initialization_timeout=timeout,
        heartbeat_timeout_seconds=_NEVER,
    )
    return Peers(process_id, num_processes, lines)


def _meet(coordinator: str, count: int, index: int, timeout: int) -> dict[int, socket.socket]:
    """Wait until all processes are there, at the address where JAX's own service will listen next; connections stay.

    When time is up, JAX's client (0.10.2 and 0.12.0) ends the process with a stack trace from C++, on the coordinator
    too; so it is called only once all have come.
    """
    deadline = time.monotonic() + timeout
    if index == 0:
        return _gather(coordinator, count, deadline, timeout)
    host, port = address_of(coordinator)
    reason: object = "it did not say that all had come"
    while (left := deadline - time.monotonic()) > 0:
        answer, line = "", None
        try:
            line = socket.create_connection((host, port), timeout=left)
            line.sendall(f"{index} {count}\n".encode())
            answer = _read_line(line)
        except OSError as error:
            reason = error.strerror or error
        if answer == "go" and line is not None:
            return {0: line}
        if line is not None:
            line.close()
        if answer.startswith(_REFUSAL):
            raise BadInput(answer.removeprefix(_REFUSAL))
        if answer.startswith(_MISSING):
            raise OthersMissing(answer.removeprefix(_MISSING))
        time.sleep(min(0.2, max(left, 0)))
    raise OthersMissing(
        f"--coordinator {coordinator}: process {index} had no answer in {timeout} s ({reason}); is process 0 running "
        f"there, are all {count} processes started, and is the port open?"
    )


def _gather(coordinator: str, count: int, deadline: float, timeout: int) -> dict[int, socket.socket]:
    """Process 0's side of :func:`_meet`."""
    port = address_of(coordinator)[1]
    family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
    lines: dict[int, socket.socket] = {}
    try:
        with socket.create_server(("", port), family=family, dualstack_ipv6=family == socket.AF_INET6) as server:
            while len(lines) < count - 1:
                server.settimeout(max(deadline - time.monotonic(), 0.01))
                line, _ = server.accept()
                _welcome(line, lines, count)
        _tell(lines, "go")
    except TimeoutError as error:
        late = ", ".join(str(i) for i in range(1, count) if i not in lines)
        said = f"--coordinator {coordinator}: process(es) {late} of {count} did not come within {timeout} s; start them"
        _tell(lines, _MISSING + said)
        raise OthersMissing(said) from error
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise BadInput(
            f"--coordinator {coordinator}: process 0 can't listen there ({reason}); choose another port"
        ) from error
    return lines


def _welcome(line: socket.socket, lines: dict[int, socket.socket], count: int) -> None:
    """Note who has come; whoever does not speak as a process of ours does is sent away."""
    line.settimeout(5)
    try:
        index, their_count = (int(word) for word in _read_line(line).split())
    except (OSError, ValueError):
        line.close()
        return
    said = None
    if their_count != count:
        said = f"process 0 was started with --num_processes {count} and process {index} with {their_count}; use one"
    elif index in lines:
        said = f"two processes were started with --process_id {index}; give each its own, 0 to {count - 1}"
    lines.setdefault(index, line)
    if said is not None:
        _tell({**lines, -1: line}, _REFUSAL + said)
        raise BadInput(said)


def _tell(lines: dict[int, socket.socket], text: str) -> None:
    """Say it to all; refused ones are sent away."""
    for line in lines.values():
        with contextlib.suppress(OSError):  # it has gone; its own end says why
            line.sendall(f"{text}\n".encode())
        if text.startswith((_REFUSAL, _MISSING)):
            line.close()


def _read_line(line: socket.socket) -> str:
    """Byte by byte, since what comes after it is for :class:`Peers`."""
    read = b""
    while not read.endswith(b"\n") and (byte := line.recv(1)):
        read += byte
    return read.decode(errors="replace").strip()
