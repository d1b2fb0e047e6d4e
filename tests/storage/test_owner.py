"""One process at a time drives a run in an output directory."""

import json
import multiprocessing
import os
import signal
import time

import psutil
import pytest

from shardprune.errors import InputError, StorageError
from shardprune.storage import owner
from shardprune.storage.folder import Folder
from shardprune.storage.output_names import OWNER
from shardprune.storage.owner import check_unowned, owned

FORK = multiprocessing.get_context("fork")
ELSEWHERE = {"host": "elsewhere", "boot": "b", "process": 1, "started": 1.0}


@pytest.fixture
def folder(tmp_path):
    return Folder(str(tmp_path / "out"), "out")


@pytest.fixture
def other(folder):
    """Another process, which owns the directory until it is killed."""

    def own(told):
        with owned(folder):
            told.set()
            signal.pause()

    told = FORK.Event()
    process = FORK.Process(target=own, args=(told,))
    process.start()
    assert told.wait(60)
    yield process
    process.kill()
    process.join()


def test_the_directory_of_a_living_process_is_refused(folder, other):
    reason = f"out: {folder.url} is in use by another run \\(process {other.pid} on .*\\); wait for its end, or stop it"
    with pytest.raises(InputError, match=reason), owned(folder):
        pass
    assert json.loads(folder.read_text(OWNER))["process"] == other.pid


def test_a_killed_process_owns_nothing(folder, other):
    os.kill(other.pid, signal.SIGKILL)  # nobody waits for it: it is there as a zombie
    while other.is_alive():
        time.sleep(0.01)
    with owned(folder) as ownership:
        ownership.check()
    assert not folder.is_file(OWNER)


def test_a_step_of_the_clock_changes_no_owner(folder, other, monkeypatch):
    with pytest.raises(InputError, match="is in use by another run"):
        check_unowned(folder)
    monkeypatch.setattr(psutil._pslinux, "boot_time", lambda: time.time())  # what psutil adds to a process's start
    with pytest.raises(InputError, match="is in use by another run"):
        check_unowned(folder)


def test_a_process_owns_a_directory_once(folder):
    with owned(folder) as outer:
        with owned(folder) as inner:
            inner.check()
        outer.check()  # still
    assert not folder.is_file(OWNER)


def test_only_silence_tells_that_a_process_of_another_machine_is_dead(folder, monkeypatch):
    slept = []
    monkeypatch.setattr(
        owner.time, "sleep", lambda seconds: (slept.append(seconds), clock.__setitem__(0, clock[0] + seconds))
    )
    clock = [1000.0]
    monkeypatch.setattr(owner.time, "time", lambda: clock[0])
    monkeypatch.setattr(owner.time, "monotonic", lambda: clock[0])
    folder.write_json(OWNER, {**ELSEWHERE, "time": 990.0})
    check_unowned(folder)
    assert sum(slept) == owner.SILENCE_SECONDS - 10
    slept.clear()
    folder.write_json(OWNER, {**ELSEWHERE, "time": 5000.0})  # by a clock that is ahead
    check_unowned(folder)
    assert sum(slept) == owner.SILENCE_SECONDS
    slept.clear()
    folder.write_json(OWNER, {**ELSEWHERE, "time": clock[0] - 60.0})  # or by one that is behind
    check_unowned(folder)
    assert sum(slept) == owner.WATCHED_SECONDS > 2 * owner.RENEWAL_SECONDS
    slept.clear()
    folder.write_json(OWNER, {**ELSEWHERE, "time": clock[0] - 7200.0})  # no clock is
    check_unowned(folder)
    assert not slept


def test_a_process_of_another_machine_that_writes_lives(folder, monkeypatch):
    folder.write_json(OWNER, {**ELSEWHERE, "time": time.time()})
    monkeypatch.setattr(owner.time, "sleep", lambda _: folder.write_json(OWNER, {**ELSEWHERE, "time": time.time()}))
    with pytest.raises(InputError, match="is in use by another run \\(process 1 on elsewhere\\)"):
        check_unowned(folder)


@pytest.mark.parametrize("content", ["", "[]", '{"host": 1}', "[" * 9999])
def test_a_record_that_is_none_is_nobodys(folder, content):
    folder.write_text(OWNER, content)
    with owned(folder) as ownership:
        ownership.check()


@pytest.mark.parametrize("what", ["taken", "moved"])
def test_a_process_notices_that_the_directory_is_not_its_own_any_more(folder, what, tmp_path):
    with owned(folder) as ownership:
        if what == "taken":
            folder.write_json(OWNER, {**ELSEWHERE, "time": time.time()})
        else:
            (tmp_path / "out").rename(tmp_path / "elsewhere")
        with pytest.raises(StorageError, match="is not this run's any more"):
            ownership.check()
    assert folder.is_file(OWNER) == (what == "taken")  # what is another's stays


def test_the_record_is_renewed(folder, monkeypatch):
    monkeypatch.setattr(owner, "RENEWAL_SECONDS", 0.01)
    with owned(folder):
        first = folder.read_text(OWNER)
        while folder.read_text(OWNER) == first:
            time.sleep(0.01)
