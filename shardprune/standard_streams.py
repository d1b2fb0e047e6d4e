"""Standard output and standard error of a command, whose readers may leave at any time.

Standard output holds the product of a command alone: libraries print on standard error instead (`without_libraries`),
and nothing before a refusal (`libraries_held`).

A reader that has left (`| head`, a terminal that is gone) and a disk that is full never end a run: what is written goes
nowhere from then on. A command whose product is its output looks at `Output.failure` when it ends.
"""

import errno
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, BinaryIO, TextIO, cast

LEFT = (errno.EPIPE, errno.EIO)  # a pipe without a reader, a terminal that has been closed


class Output:
    """A text stream that stays usable when what is behind it fails.

    Attributes:
        failure: why text is lost; None where none is, or where the reader has left and wants no more.
    """

    def __init__(self, stream: TextIO, failure: str | None = None) -> None:
        self._stream = stream
        self.failure = failure

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except UnicodeEncodeError:  # a name with half a character, or an encoding that has few
            encoding = self._stream.encoding or "ascii"
            return self.write(text.encode(encoding, "backslashreplace").decode(encoding))
        except (OSError, ValueError) as error:
            self._give_up(error)
            return len(text)

    def writelines(self, lines: Any) -> None:
        self.write("".join(lines))

    def flush(self) -> None:
        try:
            self._stream.flush()
        except (OSError, ValueError) as error:
            self._give_up(error)

    def _give_up(self, error: OSError | ValueError) -> None:
        """Send what is still buffered, and all that follows, nowhere."""
        if getattr(error, "errno", None) not in LEFT:
            self.failure = self.failure or getattr(error, "strerror", None) or str(error)
        with suppress(OSError, ValueError):  # ValueError: the stream is closed, or no file
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)
            return
        self._stream = open(os.devnull, "w")  # noqa: SIM115  for the rest of the process

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def outputs() -> Iterator[tuple[Output, Output]]:
    """Replace standard output and standard error by ones that stay usable, and yield them."""
    before = sys.stdout, sys.stderr
    closed = _open_descriptors()
    out, err = (_output(stream, number in closed) for number, stream in ((1, sys.stdout), (2, sys.stderr)))
    sys.stdout, sys.stderr = cast(TextIO, out), cast(TextIO, err)
    try:
        yield out, err
    finally:
        out.flush()
        err.flush()
        if sys.stdout is out and sys.stderr is err:
            sys.stdout, sys.stderr = before


def _output(stream: TextIO | None, closed: bool) -> Output:
    if stream is not None and not closed:
        return Output(stream)
    return Output(open(os.devnull, "w"), "it is closed")


def _open_descriptors() -> set[int]:
    """Open those of the descriptors 0 to 2 that are closed, and return them.

    Otherwise a file of the run would take one of these numbers, and what a library prints would be written into it.
    """
    closed = set()
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            closed.add(number)
            opened = os.open(os.devnull, os.O_RDWR)
            if opened != number:
                os.dup2(opened, number)
                os.close(opened)
            os.set_inheritable(number, True)
    return closed


@contextmanager
def without_libraries() -> Iterator[None]:
    """Send what is printed on standard output, by code in any language or a child process, to standard error."""
    with _diverted(2):
        yield


@contextmanager
def libraries_held() -> Iterator[None]:
    """Hold back what is printed on standard output until this has succeeded, and then print it on standard error."""
    global _held
    if _held:  # the outermost one knows whether it succeeds
        yield
        return
    _held = True
    try:
        with _memory() as words:
            with _diverted(words.fileno()):
                yield
            words.seek(0)
            with suppress(OSError):
                os.write(2, words.read(HELD))
    finally:
        _held = False


_held = False
HELD = 2**16  # bytes


def _memory() -> BinaryIO:
    """Return a file that needs no folder, as that of temporary files may be missing or full."""
    if hasattr(os, "memfd_create"):
        return open(os.memfd_create("held"), "w+b", buffering=0)
    return tempfile.TemporaryFile(buffering=0)


@contextmanager
def _diverted(descriptor: int) -> Iterator[None]:
    """Let descriptor 1 be another one; streams of Python that write to it stay the same objects."""
    _flush()
    try:
        kept = os.dup(1)
    except OSError:  # closed, by a program that calls this as a library: nothing is printed
        yield
        return
    os.dup2(descriptor, 1)
    try:
        yield
    finally:
        _flush()
        os.dup2(kept, 1)
        os.close(kept)


def _flush() -> None:
    with suppress(OSError, ValueError, AttributeError):  # full, closed, None
        sys.stdout.flush()


def lost_text() -> str | None:
    """Return why standard output has lost text, once: the command does without it."""
    if not isinstance(sys.stdout, Output):
        return None
    sys.stdout.flush()
    reason, sys.stdout.failure = sys.stdout.failure, None
    return reason
