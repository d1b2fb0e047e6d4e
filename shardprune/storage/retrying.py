"""Storage that is away for a moment: what is tried again, for how long, and what is said meanwhile."""

import errno
import logging
import os
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TypeVar

from shardprune.errors import InputError, StorageError, first_line, without_credentials

T = TypeVar("T")

ENVIRONMENT = "SHARDPRUNE_STORAGE_PATIENCE"  # seconds, for all processes that it is set in

# Of a server's answers: what the same request may not meet again. Object stores say so by status or by code.
STATUSES = frozenset({408, 429, 500, 502, 503, 504})
CODES = frozenset(
    {
        "BadDigest",  # damaged on the way
        "BandwidthLimitExceeded",
        "IncompleteBody",
        "InternalError",
        "NoSuchUpload",  # gone with what was uploaded: the next attempt starts another
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
# Of no answer, or half of one: the classes of all clients that fsspec may use, by name, as none need be installed.
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
# Though of those classes: a certificate stays what it is, and the hub's client may be told to stay offline.
PERMANENT = frozenset({"ClientConnectorCertificateError", "ClientSSLError", "OfflineModeIsEnabled", "SSLError"})
ERRNOS = frozenset(
    {
        errno.EAGAIN,
        errno.EHOSTUNREACH,
        errno.ENETDOWN,
        errno.ENETUNREACH,
        errno.ESTALE,  # a network file system's server came back
        errno.ETIMEDOUT,
    }
)

BEFORE_WORK = 30.0  # seconds of patience; a name that is mistyped looks like a server that is away
_logger = logging.getLogger(__name__)
_random = random.Random()  # one of our own: the program's seeds stay as they are


@dataclass(frozen=True)
class RetryPolicy:
    """Waits double from `first` to `longest` seconds, each shortened by chance to half at most, so that many workers
    do not come back at once. It ends `seconds` after the first failure, but not before `tries` attempts: one that
    moves much may take longer than that."""

    seconds: float = 120.0
    first: float = 0.25
    longest: float = 10.0
    tries: int = 3

    def waits(self, chance: Callable[[], float]) -> Iterator[float]:
        """Seconds before each further attempt, without end. `chance` is between 0 and 1."""
        wait = self.first
        while True:
            yield wait * (1 + chance()) / 2
            wait = min(self.longest, 2 * wait)

    @classmethod
    def now(cls) -> "RetryPolicy":
        """What the environment says, or the default: less before work begins, when nothing is lost with it.

        Raises:
            InputError: it says no number.
        """
        value = os.environ.get(ENVIRONMENT) or _default.get()
        try:
            return cls(seconds=float(value))
        except ValueError as error:
            raise InputError(ENVIRONMENT, f"{value!r} is no number of seconds") from error


_default: ContextVar[float] = ContextVar("seconds of patience", default=RetryPolicy.seconds)


@contextmanager
def preflight() -> Iterator[None]:
    """Storage that refuses what a run needs, or stays away, is bad input as long as nothing has begun.

    Raises:
        InputError: for a StorageError inside.
    """
    token = _default.set(BEFORE_WORK)
    try:
        yield
    except StorageError as error:
        raise InputError(error.field, error.problem) from error
    finally:
        _default.reset(token)


def retry(
    operation: Callable[[], T],
    what: str,
    patience: RetryPolicy | None = None,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
    chance: Callable[[], float] = _random.random,
) -> T:
    """Call an operation on storage until it succeeds, as long as its errors are transient.

    Args:
        operation: starts from the beginning whenever it is called.
        what: it is about, for the log.

    Raises:
        Exception: the operation's, where it is not transient or patience has ended.
    """
    patience = patience or RetryPolicy.now()
    since: float | None = None
    for tries, wait in enumerate(patience.waits(chance), 1):
        try:
            return operation()
        except Exception as error:
            now = clock()
            since = now if since is None else since
            left = patience.seconds - (now - since)
            if not transient(error) or (left < wait and tries >= patience.tries):
                raise
            reason = without_credentials(f"{what}: {first_line(error)}")
            _logger.warning("%s; trying again in %.1f s, for %.0f s more", reason, wait, max(left, 0.0))
        sleep(wait)
    raise AssertionError("waits have no end")


def transient(error: BaseException) -> bool:
    """Whether the same operation may succeed later: what the first of its causes says that says anything."""
    cause: BaseException | None = error
    while cause is not None:
        verdict = _verdict(cause)
        if verdict is not None:
            return verdict
        cause = cause.__cause__
    return False


def _verdict(error: BaseException) -> bool | None:
    """The same of an error without its causes; None where it says nothing."""
    if isinstance(error, StorageError):  # has been waited for
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
    """The status and the code of the server's answer that an error is about."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):  # botocore
        code = response.get("Error", {}).get("Code")
        return response.get("ResponseMetadata", {}).get("HTTPStatusCode"), code
    values = getattr(response, "status_code", None), getattr(error, "status", None), getattr(error, "code", None)
    # requests and httpx; aiohttp; gcsfs. Other classes have other things by these names.
    return next((value for value in values if isinstance(value, int) and 400 <= value < 600), None), None
