"""What is tried again, and when: against a plain formulation, with a clock of the test's own."""

import errno
import http.client
import logging

import pytest

from shardprune.errors import InputError
from shardprune.storage.retrying import ENVIRONMENT, RetryPolicy, retry, transient


class Answered(Exception):
    """As botocore has the errors that a server answered."""

    def __init__(self, status: int, code: str = "") -> None:
        self.response = {"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}
        super().__init__(f"status {status}")


class ClientPayloadError(Exception):
    """Of aiohttp: half of a body."""


class SSLError(ConnectionError):
    """Of requests: a certificate that nobody trusts."""


def caused(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


TRANSIENT = [
    ConnectionRefusedError(),
    ConnectionResetError(),
    BrokenPipeError(),
    TimeoutError(),
    TimeoutError(),
    http.client.IncompleteRead(b""),
    OSError(errno.EHOSTUNREACH, "no route to host"),
    OSError(errno.ESTALE, "stale file handle"),
    ClientPayloadError(),
    Answered(500),
    Answered(503, "SlowDown"),
    Answered(429),
    Answered(400, "RequestTimeout"),
    Answered(404, "NoSuchUpload"),
    caused(OSError(errno.EIO, "too many requests"), Answered(429)),
    caused(ClientPayloadError(), Answered(400)),  # aiohttp's own word for it
    caused(OSError("wrapped"), caused(RuntimeError("twice"), ConnectionResetError())),
]
PERMANENT = [
    FileNotFoundError(),
    PermissionError("Access Denied"),
    IsADirectoryError(),
    OSError(errno.ENOSPC, "no space left on device"),
    ValueError("what was given"),
    KeyError("a bug"),
    SSLError(),
    Answered(403, "AccessDenied"),
    Answered(403, "InvalidAccessKeyId"),
    Answered(404, "NoSuchBucket"),
    Answered(416, "InvalidRange"),
    caused(PermissionError("Access Denied"), Answered(403, "AccessDenied")),
]


@pytest.mark.parametrize(("error", "expected"), [(e, True) for e in TRANSIENT] + [(e, False) for e in PERMANENT])
def test_what_may_succeed_later(error, expected):
    assert transient(error) == expected


class World:
    """A clock that only sleeping and working move on, and an operation that fails for a while."""

    def __init__(self, failures: float, error: Exception | None = None, work: float = 0.0) -> None:
        self.now, self.failures, self.error, self.work = 100.0, failures, error or TimeoutError("busy"), work
        self.sleeps: list[float] = []
        self.attempts = 0

    def operation(self) -> str:
        self.attempts += 1
        self.now += self.work
        if self.attempts <= self.failures:
            raise self.error
        return "done"

    def sleep(self, seconds: float) -> None:
        self.sleeps.append(seconds)
        self.now += seconds

    def retry(self, patience: RetryPolicy | None, chance: float = 1.0) -> str:
        return retry(self.operation, "s3://b/x", patience, lambda: self.now, self.sleep, lambda: chance)


@pytest.mark.parametrize("chance", [0.0, 0.4, 1.0])
def test_waits_double_up_to_the_longest_and_are_shortened_by_chance(chance):
    world = World(failures=6)
    assert world.retry(RetryPolicy(1000, first=0.5, longest=4), chance) == "done"
    assert world.sleeps == [wait * (0.5 + chance / 2) for wait in (0.5, 1, 2, 4, 4, 4)]


def test_patience_ends_with_the_error_itself():
    world = World(failures=float("inf"))
    with pytest.raises(TimeoutError) as caught:
        world.retry(RetryPolicy(20, first=0.5, longest=4))
    assert caught.value is world.error
    assert world.sleeps == [0.5, 1, 2, 4, 4, 4, 4]  # 19.5 s; another wait would pass the 20th second
    assert world.attempts == len(world.sleeps) + 1


def test_time_counts_from_the_first_failure_and_long_attempts_get_a_few():
    slow = World(failures=2, work=500)
    assert slow.retry(RetryPolicy(20)) == "done"
    hopeless = World(failures=float("inf"), work=500)
    with pytest.raises(TimeoutError):
        hopeless.retry(RetryPolicy(20, tries=3))
    assert hopeless.attempts == 3


@pytest.mark.parametrize("error", PERMANENT, ids=str)
def test_other_errors_are_not_tried_again(error):
    world = World(failures=1, error=error)
    with pytest.raises(type(error)):
        world.retry(RetryPolicy())
    assert world.sleeps == []


def test_half_a_minute_is_well_within_the_default():
    world = World(failures=0)
    began = world.now

    def away() -> str:
        if world.now - began < 30:
            raise ConnectionRefusedError
        return "back"

    assert retry(away, "x", RetryPolicy(), lambda: world.now, world.sleep, lambda: 0.0) == "back"
    assert world.now - began < 40


def test_each_wait_is_one_line_without_credentials(caplog):
    world = World(failures=3, error=TimeoutError("http://user:SECRET@host/b?token=SECRET\nand more"))
    with caplog.at_level(logging.WARNING):
        world.retry(RetryPolicy(first=0.5))
    assert len(caplog.records) == 3
    assert "SECRET" not in caplog.text
    assert caplog.messages[0] == "s3://b/x: http://host/b; trying again in 0.5 s, for 120 s more"


def test_the_environment_says_how_long(monkeypatch):
    monkeypatch.setenv(ENVIRONMENT, "3")
    world = World(failures=float("inf"))
    with pytest.raises(TimeoutError):
        world.retry(None)
    assert world.sleeps == [0.25, 0.5, 1]  # and 2 more would pass the third second


@pytest.mark.parametrize("value", ["long", "nan", "inf", "-1"])
def test_the_environment_says_a_number_of_seconds(value, monkeypatch):
    monkeypatch.setenv(ENVIRONMENT, value)
    with pytest.raises(InputError, match=f"^{ENVIRONMENT}: '{value}' is no number of seconds; use 0 or more$"):
        World(failures=float("inf")).retry(None)
