"""What several tests need: devices, tiny models of every family, shared material where it is there."""

import gc
import os
import signal
import sys
from contextlib import ExitStack
from pathlib import Path

os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# What tests start may be cut off in the middle of a file, also of one with a module's code.
os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
# Threads of several processes on few cores otherwise spin while they wait for one another: up to six times as slow.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest

from shardprune.recipes.imports import uncollected

with uncollected():
    import setuptools  # noqa: F401  before DeepSpeed imports distutils, which it replaces
    import torch

    from tests.support.dying import dying_at
    from tests.support.tiny import make_model, make_tokens

# Modules of the tests, which pytest rewrites, are compiled once for all processes of a run.
sys.dont_write_bytecode = False

# A shell ignores Ctrl-C in what it starts in the background, and nohup the end of a terminal; both are inherited, and
# tests send them.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

SHARED = Path(__file__).resolve().parents[2] / "shared"
# What takes longest comes first, so that no process of several is left alone with it at the end.
LONG = (
    "failures",
    "cluster/slurm/test_jobs",
    "cluster/on_ray",
    "recovery",
    "jobs",
    "cluster",
    "commands/test_mop",
    "planning/test_memory",
    "docs",
    "test_benchmarks",
    "report",
    "storage",
    "commands",
)
# Folders whose tests share a Ray cluster, two processes that train, a server: what takes long to start. The first of
# these has work for two clusters.
TOGETHER = ("tests/cluster/on_ray/test_ray", "tests/cluster/on_ray/", "tests/recovery/", "tests/storage/")


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    """What is imported and collected stays: looking through it for garbage takes a third of the time."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


def pytest_collection_modifyitems(items):
    def place(item) -> int:
        name = item.path.relative_to(Path(__file__).parent).as_posix()
        return next((index for index, long in enumerate(LONG) if name.startswith(long)), len(LONG))

    items.sort(key=place)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """The tests of such a folder go to one process, as those of one file do."""
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid):
            file = super()._split_scope(nodeid)
            return next((folder for folder in TOGETHER if file.startswith(folder)), file)

    return Scheduling(config, log) if config.getoption("dist") == "loadfile" else None


@pytest.fixture(autouse=True, scope="module")
def _garbage_of_earlier_files():
    """What has been imported is half a million objects, through which no later collection has to look again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _one_thread():
    """The order of a CPU's sums depends on the number of threads: leave it as each test finds it.

    A second thread takes tiny models half as much of the CPUs again and makes nothing faster.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request) -> str:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU")
    return request.param


@pytest.fixture(scope="session")
def english_model() -> str:
    """A small trained Llama from the shared material."""
    path = SHARED / "models" / "english-4m"
    if not path.is_dir():
        pytest.skip("shared material is absent")
    return str(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    make_model(folder / "model", "llama-3.1")
    make_tokens(folder / "tokens.npy")
    make_tokens(folder / "other.npy", samples=7, seed=1)
    return folder


@pytest.fixture
def dies_at_layer():
    """Make the writing of one layer fail, once."""
    with ExitStack() as armed:
        yield lambda layer: armed.enter_context(dying_at(layer))
