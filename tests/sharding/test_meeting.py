"""Processes find each other, and say in one line why they can't."""

import concurrent.futures
import socket
import time

import jax
import pytest

from gshardx.errors import BadInput
from gshardx.sharding import meeting
from gshardx.sharding.meeting import Meeting, address_of, take_flags
from tests.together import flags, free_port

# The command line


def test_flags_are_taken_off_and_the_rest_stays_in_order():
    argv = ["--config", "a.yaml", *flags(1, 8476, 4), "--mesh.data=2", "--coordinator_timeout", "7", "--x"]
    where, rest = take_flags(argv)
    assert where == Meeting("127.0.0.1:8476", 4, 1, 7)
    assert rest == ["--config", "a.yaml", "--mesh.data=2", "--x"]
    assert take_flags(["--x", "1"]) == (Meeting(None, None, None, 300), ["--x", "1"])


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--num_processes", "2", "--process_id", "0"], "--process_id: give --coordinator HOST:PORT too"),
        (["--coordinator", "a:1"], "--coordinator: give --num_processes N and --process_id I too"),
        (["--coordinator", "a"], "give --num_processes"),
        ([*flags(2, 8476)], "--process_id 2: must be a whole number, 0 to 1"),
        ([*flags(-1, 8476)], "--process_id -1: must be a whole number, 0 to 1"),
        ([*flags(0, 8476, 0)], "--num_processes 0: must be a whole number, 1 or more"),
        ([*flags(0, 8476, "two")], "--num_processes two: must be a whole number"),
        ([*flags(0, 70000)], "--coordinator 127.0.0.1:70000: not HOST:PORT with a port of 1 to 65535"),
        ([*flags(0, "http")], "not HOST:PORT"),
        ([*flags(0, 8476), "--coordinator_timeout", "0"], "--coordinator_timeout 0: must be a whole number, 1 or more"),
        (["--coordinator"], "--coordinator: expected one argument; give it a value"),
    ],
    ids=str,
)  # fmt: skip
def test_a_mistake_in_the_flags_is_named(argv, said):
    with pytest.raises(BadInput) as caught:
        take_flags(argv)
    assert said in str(caught.value)


def test_addresses():
    assert address_of("node-7.cluster:8476") == ("node-7.cluster", 8476)
    assert address_of("[fe80::1]:80") == ("fe80::1", 80)
    for bad in ("node", ":80", "node:", "fe80::1:80", "node:0", "http://node:80/"):
        with pytest.raises(BadInput, match="not HOST:PORT"):
            address_of(bad)


# Meeting


def meet(count, *who, timeout=20, coordinator=None):
    """What becomes of processes ``who``, (index, count) each, that wait for each other in threads."""
    address = coordinator or f"127.0.0.1:{free_port()}"

    def one(index, count):
        try:
            return sorted(meeting._meet(address, count, index, timeout))
        except BadInput as error:
            return f"{error.exit_code}: {error}"

    with concurrent.futures.ThreadPoolExecutor() as threads:
        return [f.result() for f in [threads.submit(one, i, n or count) for i, n in who]]


def test_all_wait_until_all_are_there():
    assert meet(4, (3, 0), (1, 0), (0, 0), (2, 0)) == [[0], [0], [1, 2, 3], [0]]


def test_those_who_do_not_come_are_named_to_all_who_did():
    coordinator, one = meet(4, (0, 0), (2, 0), timeout=1)
    assert coordinator.startswith("3: ")
    assert one.startswith("3: ")
    assert "process(es) 1, 3 of 4 did not come within 1 s" in coordinator
    assert "process(es) 1, 3 of 4" in one or "process 2 had no answer in 1 s" in one


def test_without_process_0_there_is_no_answer():
    started = time.monotonic()
    (said,) = meet(2, (1, 0), timeout=1)
    assert "process 1 had no answer in 1 s (Connection refused); is process 0 running there" in said
    assert time.monotonic() - started < 5


def test_an_unknown_host_is_tried_until_the_time_is_up():
    (said,) = meet(2, (1, 0), timeout=1, coordinator="no-such-host.invalid:8476")
    assert "--coordinator no-such-host.invalid:8476: process 1 had no answer in 1 s" in said


def test_processes_that_contradict_each_other_are_told():
    both = "2: process 0 was started with --num_processes 2 and process 1 with 3; use one"
    assert meet(2, (0, 2), (1, 3)) == [both, both]
    said = meet(3, (0, 0), (1, 0), (1, 0))
    assert said == ["2: two processes were started with --process_id 1; give each its own, 0 to 2"] * 3


def test_a_taken_port_is_named():
    with socket.create_server(("", 0)) as taken:
        (said,) = meet(2, (0, 0), coordinator=f"127.0.0.1:{taken.getsockname()[1]}")
    assert "process 0 can't listen there (Address already in use); choose another port" in said


def test_a_stranger_at_the_port_is_sent_away():
    address = f"127.0.0.1:{free_port()}"
    with concurrent.futures.ThreadPoolExecutor() as threads:
        first = threads.submit(meeting._meet, address, 2, 0, 20)
        while True:
            try:
                stranger = socket.create_connection(address_of(address), timeout=5)
                break
            except ConnectionRefusedError:
                time.sleep(0.01)
        stranger.sendall(b"GET / HTTP/1.1\r\n")
        assert stranger.recv(100) == b""
        stranger.close()
        assert list(threads.submit(meeting._meet, address, 2, 1, 20).result()) == [0]
        assert list(first.result()) == [1]


# Clusters

SLURM = {
    "SLURM_JOB_ID": "4096",
    "SLURM_STEP_NODELIST": "node[003-004]",
    "SLURM_NTASKS": "2",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
}
OPEN_MPI = {
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
}
GKE = {  # a JobSet of two slices of two hosts
    "TPU_WORKER_HOSTNAMES": "job-1-0,job-1-1",
    "TPU_WORKER_ID": "1",
    "MEGASCALE_COORDINATOR_ADDRESS": "localhost",
    "MEGASCALE_NUM_SLICES": "2",
    "MEGASCALE_SLICE_ID": "1",
    "TPU_SKIP_MDS_QUERY": "1",
}


@pytest.fixture
def joined(monkeypatch):
    """What join hands to JAX."""
    calls = []
    monkeypatch.setattr(meeting, "_meet", lambda *arguments: calls.append(arguments) or {})
    monkeypatch.setattr(jax.distributed, "initialize", lambda *arguments, **_: calls.append(arguments))
    monkeypatch.setattr(jax.config, "update", lambda *_: None)
    return calls


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        (SLURM, ("node003:61440", 2, 1, [0])),
        (OPEN_MPI, ("10.96.0.1", 4, 3, [1])),
        (GKE, ("localhost:8482", 4, 3, None)),
    ],
    ids=["SLURM", "Open MPI", "GKE"],
)
def test_clusters_tell_who_a_process_is(monkeypatch, joined, environment, expected):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    if environment is GKE:
        for module in ("cloud_tpu_cluster", "cluster"):
            monkeypatch.setattr(f"jax._src.clusters.{module}.running_in_cloud_tpu_vm", True)
    assert meeting.join().count == expected[1]
    (address, *met, _), initialized = joined
    assert address.startswith(expected[0])
    assert met == list(expected[1:3])
    assert initialized == (address, *expected[1:])


def test_one_process_is_left_alone(monkeypatch, joined):
    assert meeting.join().count == 1
    for name, value in {**SLURM, "SLURM_NTASKS": "1", "SLURM_PROCID": "0"}.items():
        monkeypatch.setenv(name, value)
    assert meeting.join().count == 1
    assert meeting.join("localhost:1", 1, 0).count == 1
    assert not joined


def test_flags_outrank_the_cluster(monkeypatch, joined):
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    assert meeting.join("node9:1", 3, 2, 60).count == 3
    assert joined == [("node9:1", 3, 2, 60), ("node9:1", 3, 2, None)]
