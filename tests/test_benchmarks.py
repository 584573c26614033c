"""The benchmarks of the MoE layer run; what they measure, nobody checks here."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


def output(script, *arguments):
    """What a benchmark prints, without the tests' own device count: the script settles it."""
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    command = [sys.executable, str(BENCHMARKS / script), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_memory_of_the_layer():
    found = json.loads(output("moe_layer.py", "--part", "memory", "--small", "--json"))
    assert [row["s"] for row in found["rows"]] == [16, 64]
    shorter, longer = (row["gather bytes / (s k m 4)"] for row in found["rows"])
    assert longer <= 1.1 * shorter  # of the routing too: nothing grows with the square of s


@pytest.mark.slow
def test_every_table_of_the_gpu_benchmark(tmp_path):
    printed = output("gpu.py", "--small", "--output", str(tmp_path / "tables.md"))
    titles = [line.removeprefix("### ").split(",")[0] for line in printed.splitlines() if line.startswith("### ")]
    assert titles == ["Device", "Measured ceilings", "Grouped matrix products", "MoE layers"]
    assert "measures nothing" in printed
    assert (tmp_path / "tables.md").read_text() == printed
    for layer in ("gather, capacity 1.0", "gather, capacity 1.25", "ragged, dropless"):
        assert f"| gshardx {layer}" in printed
