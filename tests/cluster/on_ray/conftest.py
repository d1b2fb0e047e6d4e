"""One cluster of this machine with four slots for all tests on Ray's actors; tests/conftest.py keeps them together."""

import pytest

from tests.support.clusters import cluster


@pytest.fixture(scope="package")
def ray():
    with cluster(4) as ray:
        yield ray
