"""Models and data for all pages, made once; an S3 server, started if a page needs one."""

import os
from contextlib import ExitStack

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import pytest

from tests.docs.shell import Shell
from tests.docs.standins import Material
from tests.support.s3 import serve


@pytest.fixture(scope="session")
def material(tmp_path_factory):
    import datasets

    folder = tmp_path_factory.mktemp("docs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
        yield Material(folder)


@pytest.fixture(scope="session")
def storage():
    started = []
    with ExitStack() as stack:

        def start():
            if not started:
                started.append(stack.enter_context(serve()))
            return started[0]

        yield start


@pytest.fixture
def shell(material, storage, tmp_path):
    shell = Shell(tmp_path, material, storage)
    yield shell
    shell.close()
