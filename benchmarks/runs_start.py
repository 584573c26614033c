"""How long the train command takes from its creation to the first step of a run that goes on; real processes."""

import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from report import NotMeasured

CONFIG = Path(__file__).resolve().parent.parent / "configs" / "quickstart.yaml"
SAVED = 10
"""The step from which each restart goes on."""
PATIENCE = 600.0  # seconds
IMPORTS = "import gshardx.train.__main__, gshardx.train.loop"


def command(run: Path) -> list[str]:
    flags = {"config": CONFIG, "run_dir": run, "checkpoint.every": SAVED}
    return [sys.executable, "-m", "gshardx.train", *(f"--{name}={value}" for name, value in flags.items())]


@contextlib.contextmanager
def started(run: Path, environment: dict[str, str]) -> Iterator[subprocess.Popen[str]]:
    """A process that is killed at the end, as by a lost machine."""
    with (run.parent / "log").open("w") as log:
        process = subprocess.Popen(command(run), stdout=log, stderr=log, text=True, env=environment)
        try:
            yield process
        finally:
            process.kill()
            process.wait()


def wait_for(process: subprocess.Popen[str], path: Path, log: Path) -> float:
    """Until ``path`` is there with something in it; how long, in seconds.

    Raises:
        NotMeasured: the process ended, or took too long.
    """
    start = time.perf_counter()
    while not (path.exists() and path.stat().st_size):
        if process.poll() is not None or time.perf_counter() - start > PATIENCE:
            raise NotMeasured(f"{path.name} was not written: {(log.read_text().splitlines() or ['no word'])[-1][:200]}")
        time.sleep(0.01)
    return time.perf_counter() - start


def restart(run: Path, environment: dict[str, str]) -> dict[str, float]:
    """Seconds until the first line of metrics, and those of them in each of the ledger's buckets."""
    before = json.loads((run / "goodput.json").read_text())["seconds"]
    metrics = run / "metrics.jsonl"
    metrics.unlink()
    start = time.perf_counter()
    with started(run, environment) as process:
        wait_for(process, metrics, run.parent / "log")
        whole = time.perf_counter() - start
        while not (line := metrics.read_text()).endswith("\n"):
            time.sleep(0.01)
    first = json.loads(line.splitlines()[0])
    assert first["step"] == SAVED + 1, f"went on at step {first['step']}"
    then = {name: first[f"goodput/{name}"] - seconds for name, seconds in before.items()}
    return {"first step": whole} | {
        name.replace("_", " "): then[name] for name in ("init", "restore", "compile", "step")
    }


def import_seconds(environment: dict[str, str]) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", IMPORTS], env=environment, check=True)
    return time.perf_counter() - start


def measure(rounds: int) -> dict[str, Any]:
    """Medians of ``rounds`` restarts after one start with an empty compile cache, which is killed once it has saved."""
    with tempfile.TemporaryDirectory() as name:
        run = Path(name).absolute() / "run"
        environment = os.environ | {"XDG_CACHE_HOME": str(run.parent / "cache"), "JAX_PLATFORMS": "cpu"}
        environment.pop("JAX_COMPILATION_CACHE_DIR", None)
        with started(run, environment) as process:
            cold = wait_for(process, run / "metrics.jsonl", run.parent / "log")
            wait_for(process, run / "checkpoints" / str(SAVED) / "manifest.json", run.parent / "log")
        starts = [restart(run, environment) for _ in range(rounds)]
        imports = [import_seconds(environment) for _ in range(rounds)]
    return {
        "cold": cold,
        "firsts": [one["first step"] for one in starts],
        "imports": statistics.median(imports),
        "parts": {name: statistics.median(one[name] for one in starts) for name in starts[0]},
    }
