"""Signals that stop a process, and what becomes of them in it."""

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest

from shardprune.errors import Stopped
from shardprune.signals import NAMES, SAME_SECONDS, as_completed, handlers_kept, stoppable, stopping

WENT_ON: list[object] = []  # what a signal did not stop


def swallowed() -> None:
    """What the parser of the command line does: an interrupt becomes an exit code."""
    try:
        told()
    except KeyboardInterrupt:
        return


def turned() -> None:
    """What `ray.get` does: it raises an interrupt of its own."""
    try:
        told()
    except KeyboardInterrupt:
        raise KeyboardInterrupt from None


def failing() -> None:
    """What may happen while everything closes."""
    try:
        told()
    except KeyboardInterrupt as interrupt:
        os.kill(os.getpid(), signal.SIGTERM)  # which comes twice
        raise RuntimeError("closed already") from interrupt


def finalizing() -> None:
    """Where no exception can be raised."""

    class Closing:
        def __del__(self) -> None:
            told()

    closing = Closing()
    del closing
    time.sleep(10)  # the signal comes again
    WENT_ON.append(finalizing)


def told(number: int = signal.SIGTERM) -> None:
    os.kill(os.getpid(), number)
    time.sleep(5)  # which the signal ends


@pytest.mark.parametrize("work", [told, swallowed, turned, failing, finalizing])
def test_a_run_that_is_told_to_stop_has_stopped(work):
    before = [signal.getsignal(number) for number in NAMES]
    with pytest.raises(Stopped), stoppable():
        work()
    assert [signal.getsignal(number) for number in NAMES] == before
    assert not stopping()
    assert not WENT_ON


@pytest.mark.parametrize("number", NAMES)
def test_the_first_signal_counts(number):
    def stopped_again() -> None:
        try:
            told(number)
        finally:
            assert stopping()
            for other in NAMES:  # SIGINT too: a wrapper passes on the one that the terminal has sent already
                os.kill(os.getpid(), other)

    with pytest.raises(Stopped) as stop, stoppable():
        stopped_again()
    assert stop.value.signal == number


def test_a_signal_that_a_process_was_started_to_ignore_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with stoppable():
            os.kill(os.getpid(), signal.SIGHUP)
            time.sleep(0.01)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_second_interrupt_ends_the_process_and_what_belongs_to_it():
    """The first one is lost in a block that nothing may leave."""
    code = (
        "import subprocess, time\n"
        "from shardprune.signals import ending_with_this, stoppable\n"
        "child = subprocess.Popen(['sleep', '60'], start_new_session=True)\n"
        "with stoppable(), ending_with_this(child.pid):\n"
        "    for line in (child.pid, 'lost'):\n"
        "        try:\n"
        "            print(line, flush=True)\n"
        "            time.sleep(60)\n"
        "        except KeyboardInterrupt:\n"
        "            pass\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    child = psutil.Process(int(process.stdout.readline()))
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "lost\n"
    time.sleep(SAME_SECONDS + 0.1)
    process.send_signal(signal.SIGINT)
    assert process.wait(120) == 128 + signal.SIGINT
    child.wait(120)


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_other_ends_stay_what_they_are(error):
    with pytest.raises(error) as raised, stoppable():
        raise error
    assert raised.type is error


def set_from_python(number: int) -> None:
    with handlers_kept():
        signal.signal(number, signal.SIG_IGN)
        told(number)


def set_below_python(number: int) -> None:
    """What Ray's own library does, as the last thing when it connects."""
    with handlers_kept():
        set_handler = ctypes.CDLL(None).signal
        set_handler.argtypes = [ctypes.c_int, ctypes.c_void_p]
        set_handler(number, 1)  # which is SIG_IGN
    told(number)


@pytest.mark.parametrize("number", NAMES)
@pytest.mark.parametrize("library", [set_from_python, set_below_python])
def test_a_library_cannot_change_what_a_signal_does(library, number):
    with pytest.raises(Stopped), stoppable():
        library(number)


def test_a_signal_that_another_thread_gets_ends_the_wait_for_futures():
    over = threading.Event()

    def work() -> None:
        time.sleep(0.2)  # until the main thread waits
        signal.pthread_kill(threading.get_ident(), signal.SIGTERM)
        over.wait(60)

    with ThreadPoolExecutor() as pool:
        future = pool.submit(work)
        try:
            with pytest.raises(Stopped), stoppable():
                list(as_completed([future]))
            assert not future.done()
        finally:
            over.set()


def test_a_library_may_change_what_other_signals_do():
    before = signal.getsignal(signal.SIGUSR2)
    with handlers_kept():
        assert signal.signal(signal.SIGUSR2, signal.SIG_IGN) == before
        assert signal.signal(signal.SIGUSR2, before) == signal.SIG_IGN
