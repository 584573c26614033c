"""What every test of the planner shares."""

import os

import pytest


@pytest.fixture(autouse=True)
def _environment():
    """`prepare` sets variables for the whole process; give them back."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)
