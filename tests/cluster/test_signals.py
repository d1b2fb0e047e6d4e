"""SIGTERM and what becomes of it."""

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from shardprune.cluster.signals import EXIT_CODE, as_completed, handlers_kept, stoppable
from shardprune.errors import Stopped
from shardprune.recipes.demo import bundled_model


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


def told() -> None:
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(5)  # which the signal ends


@pytest.mark.parametrize("work", [told, swallowed, turned, failing])
def test_a_run_that_is_told_to_stop_has_stopped(work):
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Stopped), stoppable():
        work()
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_other_ends_stay_what_they_are(error):
    with pytest.raises(error) as raised, stoppable():
        raise error
    assert raised.type is error


def set_from_python() -> None:
    with handlers_kept():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        told()


def set_below_python() -> None:
    """What Ray's own library does, as the last thing when it connects."""
    with handlers_kept():
        set_handler = ctypes.CDLL(None).signal
        set_handler.argtypes = [ctypes.c_int, ctypes.c_void_p]
        set_handler(signal.SIGTERM, 1)  # which is SIG_IGN
    told()


@pytest.mark.parametrize("library", [set_from_python, set_below_python])
def test_a_library_cannot_change_what_sigterm_does(library):
    with pytest.raises(Stopped), stoppable():
        library()


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
    before = signal.getsignal(signal.SIGINT)
    with handlers_kept():
        assert signal.signal(signal.SIGINT, signal.SIG_IGN) == before
        assert signal.signal(signal.SIGINT, before) == signal.SIG_IGN


def test_a_run_that_is_told_while_it_starts_ray_says_so(tmp_path):
    command = ["prune", bundled_model(), "--calibration=stdlib", "--sparsity=0.5", "--device=cpu", "--out=o"]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    environment["PYTHONPATH"] = str(Path(__file__).parents[2])
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    run = psutil.Popen(
        [sys.executable, "-m", "shardprune", *command], cwd=tmp_path, env=environment, text=True, **pipes
    )
    while not [child for child in run.children() if child.name() == "gcs_server"]:  # Ray's first, of many in seconds
        assert run.poll() is None, run.stderr.read()
        time.sleep(0.01)
    run.terminate()
    _, errors = run.communicate(timeout=60)
    assert run.returncode == EXIT_CODE, errors
    assert errors.splitlines()[-1].startswith("error: stopped by SIGTERM; what is finished is kept")
