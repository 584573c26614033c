"""How fast a checkpoint is restored, checksums included, beside how fast its files can be read at all."""

import dataclasses
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from gshardx_train import config_of, random_rows
from shape import MIXTRAL

from gshardx.checkpoint.restore import restore
from gshardx.checkpoint.store import CheckpointStore
from gshardx.sharding import MeshConfig, simulate_devices
from gshardx.train.job import Job
from gshardx.train.resume import items_of
from gshardx.train.state import TrainState

DEVICES = 8
SHAPE = dataclasses.replace(MIXTRAL, width=512, head_dim=64, expert_hidden=1536, batch=DEVICES)
"""1 GB of parameters and moments; over fsdp, so that no device holds what another one does."""
THREADS = (1, 4, 8)
"""That read files side by side; the fastest number is the disk's speed."""
_PIECE = 1 << 22  # bytes


def filled(abstract: Any, draw: np.random.Generator) -> Any:
    """An array of ``abstract``'s shape, in its shards; normal numbers, since zeros would be compressed away."""
    if abstract.dtype != np.float32:
        values = np.zeros(abstract.shape, abstract.dtype)
    else:
        values = draw.standard_normal(abstract.shape, np.float32) / 50
    return jax.device_put(values, abstract.sharding)


def files_of(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.rglob("*")) if path.is_file()]


def forget(files: Sequence[Path]) -> None:
    """Take them out of Linux's page cache."""
    for path in files:
        file = os.open(path, os.O_RDONLY)
        os.fsync(file)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(file)


def read_one(path: Path) -> None:
    piece = bytearray(_PIECE)
    with path.open("rb", buffering=0) as file:
        while file.readinto(piece):
            pass


def read_all(files: Sequence[Path], threads: int) -> None:
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(read_one, files))


class Restore:
    """What a start does with a checkpoint; ``cpu``: CPU seconds of each."""

    def __init__(self, folder: Path, job: Job, rows: Any) -> None:
        self._folder, self._job, self._rows = folder, job, rows
        self.cpu: list[float] = []

    def __call__(self) -> None:
        start = time.process_time()
        found = restore(self._folder, lambda *_: items_of(self._job.state, self._rows), print)
        assert found is not None
        jax.block_until_ready(jax.tree.leaves(found[1]))
        self.cpu.append(time.process_time() - start)


def seconds_of(action: Callable[[], None]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def rates(files: Sequence[Path], again: Restore, rounds: int, cold: bool) -> dict[str, Any]:
    """Medians over rounds of bytes a second; ratios are taken within a round."""
    again.cpu.clear()
    size = sum(path.stat().st_size for path in files)
    readers = {f"{n} thread(s)": partial(read_all, files, n) for n in THREADS}
    found: dict[str, list[float]] = {name: [] for name in (*readers, "restore")}
    for number in range(rounds):
        turns: list[tuple[str, Callable[[], None]]] = [*readers.items(), ("restore", again)]
        for name, action in turns if number % 2 == 0 else reversed(turns):
            if cold:
                forget(files)
            found[name].append(size / seconds_of(action))
    disk = max(readers, key=lambda name: statistics.median(found[name]))
    return {
        "disk": statistics.median(found[disk]),
        "disk_threads": disk,
        "restore": statistics.median(found["restore"]),
        "ratios": [a / b for a, b in zip(found["restore"], found[disk], strict=True)],
        "cpu": statistics.median(again.cpu),
    }


def measure(rounds: int) -> dict[str, Any]:
    """Cold and warm, ``rounds`` times each; call it before anything else uses JAX."""
    simulate_devices(DEVICES)
    config = dataclasses.replace(config_of(SHAPE, DEVICES), mesh=MeshConfig(fsdp=DEVICES))
    job, rows, draw = Job.of(config, vocab=SHAPE.vocab), random_rows(SHAPE), np.random.default_rng(0)
    state: TrainState = jax.tree.map(partial(filled, draw=draw), job.state)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).absolute() / "checkpoints"
        store = CheckpointStore(folder, every=1, keep=2)
        store.save(1, items_of(state, rows))
        store.wait()
        store.close()
        state_bytes = sum(array.nbytes for array in jax.tree.leaves(state))
        del state
        files, again = files_of(folder), Restore(folder, job, rows)
        again()  # the first of a process is slower
        cold, warm = rates(files, again, rounds, cold=True), rates(files, again, rounds, cold=False)
        file_bytes = sum(path.stat().st_size for path in files)
    return {"state_bytes": state_bytes, "file_bytes": file_bytes, "files": len(files), "cold": cold, "warm": warm}
