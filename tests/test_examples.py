"""The examples run, in processes of their own, and stay short."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.children import environment

EXAMPLES = sorted((Path(__file__).parent.parent / "examples").glob("*.py"))


def test_there_is_one_for_plain_jax_linen_and_equinox():
    assert [path.stem for path in EXAMPLES] == ["equinox_model", "linen", "plain_jax"]


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_has_under_forty_lines(path):
    assert len(path.read_text().splitlines()) < 40


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("plain_jax", r"loss \d\.\d+, dropped \d+\.\d%, experts on P\('expert', None, None\)"),
        ("linen", r"\(16, 32, 1\) balance 1\.\d+, dropped \d+\.\d%"),
        ("equinox_model", r"\(16, 32, 1\) bias after three steps: \[ ?-?0\.00[13]"),
    ],
)
def test_an_example_runs_and_prints_what_it_found(name, said):
    path = next(path for path in EXAMPLES if path.stem == name)
    done = subprocess.run([sys.executable, path], capture_output=True, text=True, timeout=300, env=environment())
    assert done.returncode == 0, done.stderr
    assert re.search(said, done.stdout), done.stdout
