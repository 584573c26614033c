"""One tiny server for the tests that change nothing in it."""

import dataclasses

import pytest

from tests.infer.conftest import SMALL, Model
from tests.infer.server.running import serving

ROOMY = dataclasses.replace(SMALL, max_length=256, pages=256, page_size=8, budget=32)


@pytest.fixture(scope="session")
def tiny():
    return Model()


@pytest.fixture(scope="session")
def engine(tiny):
    return tiny.engine(ROOMY)


@pytest.fixture(scope="module")
def served(engine):
    with serving(engine) as running:
        yield running
        running.until_idle()
