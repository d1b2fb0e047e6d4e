"""SIGTERM and what becomes of it."""

import os
import signal
import time

import pytest

from shardprune.stopping import Stopped, handlers_kept, stoppable


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
    time.sleep(60)


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


def test_a_library_cannot_change_what_sigterm_does():
    with stoppable():
        ours = signal.getsignal(signal.SIGTERM)
        with handlers_kept():
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        assert signal.getsignal(signal.SIGTERM) == ours
