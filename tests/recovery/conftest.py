"""What the trainings share: models, data and two processes, started once."""

import os

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import pytest

from tests.recovery.trainings import Pair, make_material


@pytest.fixture(scope="session")
def pair():
    pair = Pair()
    yield pair
    pair.end()


@pytest.fixture(scope="session")
def folder(pair, tmp_path_factory):
    """Models and data; and the two processes, which start meanwhile."""
    return make_material(tmp_path_factory.mktemp("recovery"))
