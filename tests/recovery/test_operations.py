"""DeepSpeed's compiled operations: built once, whole or not at all, and never waited for in vain."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from shardprune.errors import TrainingError
from shardprune.recovery import operations
from shardprune.recovery.operations import Cache, _imported, build_what_is_used, load_from_cache

ROOT = Path(__file__).parents[2]
# A build like DeepSpeed's: below TORCH_EXTENSIONS_DIR, in a folder of the operation's name.
BUILD = (
    "import os, pathlib, sys, time\n"
    "folder = pathlib.Path(os.environ['TORCH_EXTENSIONS_DIR'], 'adder')\n"
    "folder.mkdir()\n"
    "with open(sys.argv[1], 'a') as count: count.write('built\\n')\n"
    "(folder / 'adder.so').write_text('half')\n"
    "time.sleep(float(sys.argv[2]))\n"
    "(folder / 'adder.so').write_text('whole')\n"
)


@pytest.fixture
def cache(tmp_path):
    (tmp_path / "cache").mkdir()
    return Cache(tmp_path / "cache")


def build(cache: Cache, seconds: float = 0.0) -> tuple[str, ...]:
    return (sys.executable, "-c", BUILD, str(cache.folder.parent / "count"), str(seconds))


def count(cache: Cache) -> int:
    file = cache.folder.parent / "count"
    return len(file.read_text().splitlines()) if file.exists() else 0


def test_several_processes_build_an_operation_once(cache):
    found = []

    def use() -> None:
        found.append(cache.built("AdderBuilder", "adder", build(cache, 0.3)).read_text())

    users = [threading.Thread(target=use) for _ in range(4)]
    for user in users:
        user.start()
    for user in users:
        user.join()
    assert (found, count(cache)) == (["whole"] * 4, 1)
    assert sorted(path.name for path in cache.folder.iterdir()) == ["adder.lock", "adder.so"]


def test_a_killed_build_is_begun_anew(cache):
    """What built it is killed, with the lock in its hands; what that had started ends, too."""
    code = (
        "import sys, pathlib; from shardprune.recovery.operations import Cache\n"
        "Cache(pathlib.Path(sys.argv[1])).built('AdderBuilder', 'adder', sys.argv[2:])\n"
    )
    # The child of a build watches its parent.
    watching = "from shardprune.recovery import operations as o; import os, threading\n"
    watching += "threading.Thread(target=o._end_with, args=(os.getppid(),), daemon=True).start()\n"
    words = [sys.executable, "-c", watching + BUILD, str(cache.folder.parent / "count"), "60"]
    first = psutil.Popen([sys.executable, "-c", code, str(cache.folder), *words])
    while not count(cache):
        assert first.poll() is None
        time.sleep(0.02)
    (child,) = first.children()
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert cache.built("AdderBuilder", "adder", build(cache)).read_text() == "whole"
    assert count(cache) == 2
    child.wait(120)


def test_a_build_that_does_not_end_is_one_line(cache, monkeypatch):
    monkeypatch.setattr(operations, "BUILD_SECONDS", 0.5)
    with pytest.raises(TrainingError, match=r"building adder of DeepSpeed took more than 0.5 s"):
        cache.built("AdderBuilder", "adder", build(cache, 60))
    assert [path.name for path in cache.folder.iterdir()] == ["adder.lock"]


def test_a_build_that_fails_says_why(cache):
    code = "print('[1/2] c++'); print('adder.cpp:3:1: error: no adder'); print('ninja: stopped'); raise SystemExit(1)"
    with pytest.raises(TrainingError, match="DeepSpeed cannot build adder: adder.cpp:3:1: error: no adder"):
        cache.built("AdderBuilder", "adder", (sys.executable, "-c", code))
    assert not cache.file("adder").exists()


def test_a_process_that_builds_for_too_long_is_not_waited_for(cache, monkeypatch):
    code = "import fcntl, sys, time\nfile = open(sys.argv[1], 'wb')\nfcntl.flock(file, fcntl.LOCK_EX)\n"
    code += "print(flush=True)\ntime.sleep(60)"
    words = [sys.executable, "-c", code, str(cache.folder / "adder.lock")]
    holder = subprocess.Popen(words, stdout=subprocess.PIPE)
    own = cache._build

    def unhurried(*arguments) -> None:
        """This one's build takes as long as a busy machine lets it."""
        monkeypatch.setattr(operations, "BUILD_SECONDS", 120.0)
        own(*arguments)

    monkeypatch.setattr(cache, "_build", unhurried)
    try:
        holder.stdout.readline()
        monkeypatch.setattr(operations, "BUILD_SECONDS", 0.5)
        assert cache.built("AdderBuilder", "adder", build(cache)).read_text() == "whole"
    finally:
        holder.kill()
        holder.wait()


def test_a_home_that_cannot_be_written_leaves_the_state_of_the_training(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert Cache.of(str(tmp_path / "state"), "cpu").folder == tmp_path / "state" / "operations"


def test_a_container_does_not_use_what_its_machine_has_built(tmp_path, monkeypatch):
    """They share a home, not a C library."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    outside = Cache.of("", "cpu").folder
    assert Cache.of("", "cpu").folder == outside
    monkeypatch.setattr(os, "confstr", lambda name: {"CS_GNU_LIBC_VERSION": "glibc 2.17"}[name])
    assert Cache.of("", "cpu").folder != outside


@pytest.mark.timeout(1200)  # on a busy machine the compiler takes minutes
def test_deepspeed_loads_from_the_cache_past_the_lock_of_a_dead_build(tmp_path, monkeypatch):
    """The lock lies where torch would build, and torch would wait for it for ever."""
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    said = []
    build_what_is_used(False, str(tmp_path), said.append)  # half a minute, once for a machine
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "torch"))
    lock = tmp_path / "torch" / "deepspeed_shm_comm" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    from deepspeed.comm.torch import build_shm_op
    from deepspeed.ops.op_builder.builder import OpBuilder

    monkeypatch.setattr(OpBuilder, "jit_load", OpBuilder.jit_load)
    monkeypatch.setattr(OpBuilder, "_loaded_ops", {})
    _imported.cache_clear()
    load_from_cache(str(tmp_path), "cpu")
    assert build_shm_op().vector_kernel_level() >= 0
    again = []
    build_what_is_used(False, str(tmp_path), again.append)
    assert again == []
    assert os.listdir(lock.parent) == ["lock"]
