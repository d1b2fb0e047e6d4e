"""Retries for transient storage errors: their classification, the backoff, and the log while waiting."""

import errno
import logging
import math
import os
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TypeVar

from shardprune.errors import InputError, StorageError, first_line, without_credentials
from shardprune.standard_streams import libraries_held

T = TypeVar("T")

ENVIRONMENT = "SHARDPRUNE_STORAGE_PATIENCE"  # environment variable, seconds

# Responses that a repeated request may not get again; object stores send a status or a code.
STATUSES = frozenset({408, 429, 500, 502, 503, 504})
ABSENT = frozenset({404, 410})
CODES = frozenset(
    {
        "BadDigest",  # damaged in transit
        "BandwidthLimitExceeded",
        "IncompleteBody",
        "InternalError",
        "NoSuchUpload",  # the upload is gone: the next attempt starts a new one
        "OperationAborted",
        "RequestLimitExceeded",
        "RequestTimeout",
        "RequestTimeoutException",
        "ServiceUnavailable",
        "SlowDown",
        "Throttling",
        "ThrottlingException",
        "XAmzContentSHA256Mismatch",
    }
)
# No response or a partial one. Classes by name, since the clients of fsspec's file systems may not be installed.
CLASSES = frozenset(
    {
        "ChunkedEncodingError",  # requests
        "ClientConnectionError",  # aiohttp
        "ClientPayloadError",
        "ConnectionError",  # Python, requests and botocore
        "HTTPClientError",  # botocore
        "IncompleteRead",  # http.client and urllib3
        "IncompleteReadError",  # botocore and asyncio
        "NetworkError",  # httpx
        "RemoteProtocolError",
        "ResponseParserError",  # botocore
        "Timeout",  # requests
        "TimeoutError",  # Python, asyncio and concurrent.futures
        "TimeoutException",  # httpx
        "TransportError",  # google.auth
    }
)
# Subclasses of those that are permanent: a bad certificate, or a hub client in offline mode.
PERMANENT = frozenset({"ClientConnectorCertificateError", "ClientSSLError", "OfflineModeIsEnabled", "SSLError"})
ERRNOS = frozenset(
    {
        errno.EAGAIN,
        errno.EHOSTUNREACH,
        errno.ENETDOWN,
        errno.ENETUNREACH,
        errno.ESTALE,  # a network file system's server has restarted
        errno.ETIMEDOUT,
    }
)

BEFORE_WORK = 30.0  # seconds; short, because a mistyped host name looks like an unreachable server
_logger = logging.getLogger(__name__)
_random = random.Random()  # its own generator, so that retries do not change the program's random numbers


@dataclass(frozen=True)
class RetryPolicy:
    """Exponential backoff with jitter.

    Waits double from `first` to `longest` seconds; each is shortened at random by up to half, so that many workers do
    not return at once. Retries end `seconds` after the first failure but not before `tries` attempts: an attempt that
    moves much data may take longer than `seconds`.
    """

    seconds: float = 120.0
    first: float = 0.25
    longest: float = 10.0
    tries: int = 3

    def waits(self, chance: Callable[[], float]) -> Iterator[float]:
        """Yield the seconds before each further attempt, without end. `chance` returns a number between 0 and 1."""
        wait = self.first
        while True:
            yield wait * (1 + chance()) / 2
            wait = min(self.longest, 2 * wait)

    @classmethod
    def now(cls) -> "RetryPolicy":
        """Return the policy of the environment variable, or the default, which is shorter before work begins.

        Raises:
            InputError: the variable holds no number, or none of seconds.
        """
        value = os.environ.get(ENVIRONMENT) or _default.get()
        try:
            seconds = float(value)
        except ValueError:
            seconds = math.nan
        if not 0 <= seconds < math.inf:
            raise InputError(ENVIRONMENT, f"{value!r} is no number of seconds; use 0 or more")
        return cls(seconds=seconds)


_default: ContextVar[float] = ContextVar("seconds of retrying", default=RetryPolicy.seconds)


@contextmanager
def preflight() -> Iterator[None]:
    """Report storage errors before work begins as bad input, as until then nothing is lost, and what libraries print
    only if the input is good.

    Raises:
        InputError: for a StorageError inside.
    """
    token = _default.set(BEFORE_WORK)
    try:
        with libraries_held():
            yield
    except StorageError as error:
        raise InputError(error.field, error.problem) from error
    finally:
        _default.reset(token)


def retry(
    operation: Callable[[], T],
    what: str,
    policy: RetryPolicy | None = None,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
    chance: Callable[[], float] = _random.random,
) -> T:
    """Call an operation on storage until it succeeds, for as long as its errors are transient.

    Args:
        operation: starts from the beginning on every call.
        what: the file or folder, for the log.

    Raises:
        Exception: the operation's, if it is not transient or the policy's time is over.
    """
    policy = policy or RetryPolicy.now()
    since: float | None = None
    for tries, wait in enumerate(policy.waits(chance), 1):
        try:
            return operation()
        except Exception as error:
            now = clock()
            since = now if since is None else since
            left = policy.seconds - (now - since)
            if not transient(error) or (left < wait and tries >= policy.tries):
                raise
            reason = without_credentials(f"{what}: {first_line(error)}")
            _logger.warning("%s; trying again in %.1f s, for %.0f s more", reason, wait, max(left, 0.0))
        sleep(wait)
    raise AssertionError("waits have no end")


def transient(error: BaseException) -> bool:
    """Return whether the same operation may succeed later, by the first error in the chain of causes that can be
    classified.
    """
    cause: BaseException | None = error
    while cause is not None:
        verdict = _verdict(cause)
        if verdict is not None:
            return verdict
        cause = cause.__cause__
    return False


def _verdict(error: BaseException) -> bool | None:
    """Classify one error without its causes: True is transient, False permanent, None unknown."""
    if isinstance(error, StorageError):  # raised after retries
        return False
    names = {base.__name__ for base in type(error).__mro__}
    if names & PERMANENT:
        return False
    if names & CLASSES or (isinstance(error, OSError) and error.errno in ERRNOS):
        return True
    status, code = _answer(error)
    if code in CODES:
        return True
    return None if status is None else status in STATUSES


def _answer(error: BaseException) -> tuple[int | None, str | None]:
    """Return the status and the code of the server's response that an error carries."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):  # botocore
        code = response.get("Error", {}).get("Code")
        return response.get("ResponseMetadata", {}).get("HTTPStatusCode"), code
    values = getattr(response, "status_code", None), getattr(error, "status", None), getattr(error, "code", None)
    # Attributes of requests and httpx, aiohttp, gcsfs. Other classes use these names for other values.
    return next((value for value in values if isinstance(value, int) and 400 <= value < 600), None), None


@contextmanager
def unhidden() -> Iterator[None]:
    """Raise what keeps an HTTP server from answering as what it is, where fsspec reports it as the absence of a file.

    Raises:
        FileNotFoundError: the file is not there.
    """
    try:
        yield
    except FileNotFoundError as error:
        if hidden := _hidden_by(error):
            raise hidden from error
        raise


def _hidden_by(absence: OSError) -> BaseException | None:
    """Return the error of an HTTP server, or of the way to it, that fsspec reports as the absence of a file."""
    cause = absence.__cause__
    if isinstance(cause, TimeoutError) or type(cause).__module__.partition(".")[0] == "aiohttp":
        return None if getattr(cause, "status", None) in ABSENT else cause
    return None
