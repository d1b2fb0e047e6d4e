"""Which worker hangs, told from the signs of all, and the signs of a real process."""

import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace

import psutil
import pytest

from shardprune.cluster.patience import Patience, sign_seconds
from shardprune.errors import WorkerLost
from shardprune.shard.signs import Calls, Sign, Signs

IDLE = Sign(1, "here", "node", 7, None, 0.0, 0.0, False, "", 0.0)


def busy(seconds: float, **fields) -> Sign:
    return replace(IDLE, doing="layer 3, solve", seconds=seconds, place="sparsegpt.py:60 solve", **fields)


class Run:
    """A driver that looks at signs on a clock of the test's own."""

    def __init__(self, count: int = 2, seconds: float = 40.0, **options) -> None:
        self.now, self.given = 0.0, [IDLE] * count
        workers = [f"worker 0.{index}" for index in range(count)]
        self.patience = Patience(workers, seconds, lambda index: self.given[index], clock=lambda: self.now, **options)

    def looks(self, count: int, *silent: int, step: float = 10.0) -> None:
        for _ in range(count):
            self.now += step
            for index, sign in enumerate(self.given):
                if index not in silent and sign:
                    self.given[index] = replace(sign, number=int(self.now))
            self.patience.look()


def test_workers_without_work_are_not_lost():
    Run().looks(1000)


def test_a_silent_worker_is_named_and_not_those_that_wait_for_it():
    run = Run()
    run.given = [busy(500.0, idle=500.0, waits=True), busy(30.0)]
    run.looks(5, 1)
    with pytest.raises(WorkerLost) as lost:
        run.looks(1, 1)
    assert str(lost.value) == (
        "worker 0.1 (process 7 on here) has given no sign of life for 50.0 s; its last was from layer 3, solve"
    )
    assert run.patience.hanging == [run.given[1]]


def test_a_worker_without_a_first_sign_is_lost():
    run = Run()
    run.given[0] = None
    run.looks(30)
    with pytest.raises(WorkerLost, match="worker 0.0 has given no sign of life for 5.2 min, since its process was"):
        run.looks(1)


def test_the_longest_call_so_far_counts():
    run = Run()
    run.given[0] = replace(IDLE, longest=100.0)
    run.looks(14, 1)
    with pytest.raises(WorkerLost, match="worker 0.1 .* for 150.0 s|2.5 min"):
        run.looks(2, 1)


def test_a_driver_that_was_away_does_not_take_that_for_silence():
    """Suspended with its machine, or stopped by Ctrl-Z: no worker could be heard meanwhile."""
    run = Run()
    run.looks(1)
    run.looks(1, 0, 1, step=10_000.0)
    run.looks(5)


def test_a_worker_at_a_standstill_is_lost():
    run = Run()
    run.given[1] = busy(60.0, idle=41.0)
    with pytest.raises(WorkerLost) as lost:
        run.looks(1)
    assert str(lost.value) == (
        "worker 0.1 (process 7 on here) has been at layer 3, solve (sparsegpt.py:60 solve) for 60.0 s,"
        " 41.0 s of them without any use of the processor"
    )


def test_a_worker_at_work_has_more_time_but_not_for_ever():
    run = Run()
    run.given[1] = busy(239.0)
    run.looks(1)
    run.given[1] = busy(241.0)
    with pytest.raises(WorkerLost, match="layer 3, solve"):
        run.looks(1)


def test_a_training_is_one_call_without_an_end():
    run = Run(training=True)
    run.given = [busy(1e6, idle=3.0), None]  # the second one is still being placed
    run.looks(100)


def test_of_workers_that_all_wait_for_one_another_one_is_lost():
    run = Run()
    run.given = [busy(79.0, idle=79.0, waits=True)] * 2
    run.looks(1)
    run.given = [busy(81.0, idle=81.0, waits=True)] * 2
    with pytest.raises(WorkerLost, match="waiting for another worker, of which none is at work"):
        run.looks(1)


@pytest.mark.parametrize(("patience", "seconds"), [(600.0, 10.0), (2.0, 0.5)])
def test_a_worker_gives_several_signs_in_the_time_after_which_it_is_lost(patience, seconds):
    assert sign_seconds(patience) == seconds


STANDS_STILL = """
import subprocess, sys, threading, time
from shardprune.shard.signs import Calls, Signs

calls, given = Calls(), []
signs = Signs(calls, given.append, 0.05, "node")
signs.start()

def stand_still(event):
    event.wait(60)

def wait_for(what, meanwhile=lambda: time.sleep(0.05)):
    until = time.monotonic() + 60
    while not (given and what(given[-1])):
        assert time.monotonic() < until, given
        meanwhile()
    return given[-1]

over = threading.Event()
def still():
    with calls.during("layer 3, solve"), calls.during("a part of it"):
        stand_still(over)
thread = threading.Thread(target=still)
thread.start()
still = wait_for(lambda sign: sign.idle > 0.3)
print(still.doing, still.waits, still.seconds >= still.idle, still.place.split(":")[0])
over.set()
thread.join()

# However little of the processor the machine has for it, a call at work is soon seen to have used some.
def at_work(doing):
    return lambda sign: sign.doing == doing and sign.seconds > 1.0 and sign.idle < 0.3

with calls.during("layer 4, solve"):
    sign = wait_for(at_work("layer 4, solve"), meanwhile=lambda: sum(range(10_000)))
    print(sign.doing, sign.longest >= 0.3)
with calls.during("layer 5, compile"):
    compiler = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    print(wait_for(at_work("layer 5, compile")).doing)
    compiler.kill()
    compiler.wait()
    print(wait_for(lambda sign: sign.idle > 0.3).doing, "stands still")
"""


def test_the_signs_of_a_process_tell_work_from_a_standstill():
    """In a process of its own: threads of pytest and of Ray work in this one."""
    done = subprocess.run([sys.executable, "-c", STANDS_STILL], capture_output=True, text=True, timeout=250)
    assert (done.stdout.splitlines(), done.stderr) == (
        [
            "layer 3, solve False True threading.py",
            "layer 4, solve True",
            "layer 5, compile",
            "layer 5, compile stands still",
        ],
        "",
    )


WAITS = {
    "the handle of a collective": ("deepspeed.runtime.zero.partition_parameters", "def call(): lock.acquire()", True),
    "another's compilation": (
        "torch.utils.cpp_extension",
        "from torch.utils.file_baton import FileBaton\ndef call(): FileBaton(path).wait()",
        True,
    ),
    "its own lock": ("deepspeed.runtime.engine", "def call(): event.wait()", False),
}


@pytest.mark.parametrize(("module", "code", "waits"), WAITS.values(), ids=WAITS)
def test_a_wait_for_another_process_is_told_from_a_standstill(module, code, waits, tmp_path):
    lock, event, path = threading.Lock(), threading.Event(), tmp_path / "lock"
    lock.acquire()
    path.touch()
    space = {"__name__": module, "lock": lock, "event": event, "path": str(path)}
    exec(code, space)
    calls = Calls()

    def call() -> None:
        with calls.during("training"):
            space["call"]()

    thread = threading.Thread(target=call)
    signs = Signs(calls, lambda sign: None, 60.0, "node")
    thread.start()
    try:
        deadline = time.monotonic() + 60
        while (sign := signs.sign()).waits is not waits or sign.doing is None:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        for _ in range(20):  # it stays so
            assert signs.sign().waits is waits
    finally:
        path.unlink()
        event.set()
        lock.release()
        thread.join()


def test_a_stopped_process_gives_no_signs():
    code = (
        "import sys, time\n"
        "from shardprune.shard.signs import Calls, Signs\n"
        "Signs(Calls(), lambda sign: print(sign.number, flush=True), 0.05, 'node').start()\n"
        "time.sleep(60)\n"
    )
    process = psutil.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, bufsize=0)
    try:
        assert process.stdout.readline() == b"1\n"
        process.send_signal(signal.SIGSTOP)
        while process.status() != psutil.STATUS_STOPPED:
            time.sleep(0.01)
        os.set_blocking(process.stdout.fileno(), False)
        process.stdout.read()  # what it had given before
        time.sleep(0.5)  # ten signs otherwise
        assert process.stdout.read() is None
        os.set_blocking(process.stdout.fileno(), True)
        process.send_signal(signal.SIGCONT)
        assert int(process.stdout.readline()) > 1
    finally:
        process.kill()
        process.wait()
