"""The ledger of a device whose work is done later than calls return."""

import time

import pytest
import torch

from shardprune.shard.clocks import DeviceClock, HostClock
from shardprune.shard.ledger import CALLS_AHEAD, Ledger


class Later:
    """A clock of a device that does one call after the other, each of some seconds, when it is told to go on."""

    def __init__(self) -> None:
        self.queued = self.done = 0.0  # device seconds: of all that was asked, and of what is done
        self.waits = 0
        self.returned: list[float] = []

    def work(self, seconds: float) -> None:
        self.queued += seconds

    def mark(self) -> float:
        return self.queued

    def has_come(self, mark: float) -> bool:
        return mark <= self.done

    def wait(self, mark: float) -> None:
        if mark > self.done:
            self.waits, self.done = self.waits + 1, mark

    def seconds(self, earlier: float, later: float) -> float:
        assert later <= self.done
        return later - earlier

    def time(self, mark: float) -> float:
        return 1000 + mark

    def give_back(self, *marks: float) -> None:
        self.returned += marks


def called(ledger: Ledger, clock: Later, verb: str, seconds: float) -> None:
    started = ledger.begin()
    clock.work(seconds)
    ledger.end(verb, "statistics", 0, started, 0)


def test_calls_have_the_seconds_of_their_own_work_although_they_return_at_once():
    clock, seen = Later(), []
    ledger = Ledger(clock)
    ledger.watcher = lambda verb, kind, seconds, received: seen.append((verb, seconds))
    called(ledger, clock, "accumulate", 2.0)
    called(ledger, clock, "solve", 0.5)
    assert (clock.waits, seen) == (0, []), "nothing is waited for"
    assert ledger.seconds() == {"accumulate": 2.0, "solve": 0.5}
    assert seen == [("accumulate", 2.0), ("solve", 0.5)]
    first, second = ledger.hand_out()
    assert (first.start, first.end, first.busy) == (1000, 1002, 2.0)
    assert (second.start, second.end, second.busy) == (1002, 1002.5, 0.5)
    assert len(clock.returned) == 4


def test_calls_that_are_done_are_entered_without_waiting():
    clock = Later()
    ledger = Ledger(clock)
    for _ in range(10):
        called(ledger, clock, "accumulate", 1.0)
        clock.done = clock.queued
    assert clock.waits == 0
    assert ledger.seconds() == {"accumulate": 10.0}


def test_calls_do_not_run_away_from_the_device():
    clock = Later()
    ledger = Ledger(clock)
    for count in range(1, 10):
        called(ledger, clock, "accumulate", 1.0)
        assert clock.queued - clock.done == min(count, CALLS_AHEAD)
    (span,) = ledger.hand_out()
    assert (span.calls, span.busy) == (9, 9.0)


def test_the_hosts_clock_tells_the_time():
    clock = HostClock()
    before = time.time()
    mark = clock.mark()
    assert before - 1.0 <= clock.time(mark) <= time.time() + 1.0  # a busy machine may halt the process in between
    assert clock.seconds(mark, mark) == 0.0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_gpus_clock_times_what_the_device_does():
    device = torch.device("cuda")
    clock = DeviceClock(device)
    one = torch.randn(4096, 4096, device=device)
    one @ one
    torch.cuda.synchronize()
    ledger = Ledger(clock)
    for count in (20, 1):
        started = ledger.begin()
        for _ in range(count):
            one @ one
        ledger.end(f"{count}", "solve", None, started, 0)
    seconds = ledger.seconds()
    assert seconds["20"] > 5 * seconds["1"] > 0
    first, second = ledger.hand_out()
    assert first.end <= second.start + 0.001
    assert second.end <= time.time() + 0.1
    used = len(clock._free)
    ledger.end("again", "solve", None, ledger.begin(), 0)
    ledger.seconds()
    assert len(clock._free) == used, "events are used again"
