"""Errors that a run can end with and that are not defects of the program.

Their texts are one printable line without credentials, whatever they quote.
"""

import signal

from shardprune.printable import message
from shardprune.printable import without_credentials as without_credentials  # what names a location needs it, too


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text, or the name of its class if it has no text; printable, without
    credentials. A line that ends with a colon goes on with the next one, which has the reason."""
    lines = [line.strip() for line in str(error).strip().splitlines()] or [type(error).__name__]
    return message(" ".join(lines[: 2 if lines[0].endswith(":") else 1]))


class RunError(Exception):
    """Base of the errors, whose text is a message of one line."""

    def __init__(self, text: str) -> None:
        super().__init__(message(text))


class FieldError(RunError):
    """An error about one field of a recipe."""

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"{message(field)}: {message(problem)}")
        self.field = message(field)
        self.problem = message(problem)

    def __reduce__(self) -> tuple[type["FieldError"], tuple[str, str]]:
        # An exception is pickled with its text alone, which is not what the constructor takes.
        return type(self), (self.field, self.problem)


class InputError(FieldError, ValueError):
    """Bad input, found before any work. Its text names the field, the value and what is allowed.

    The command line prints it as one line and exits with code 2.
    """


class StorageError(FieldError, RuntimeError):
    """Storage that cannot be read or written, however long one waits.

    Its text names the field that holds the location, the file and the reason.
    """


class InputChanged(StorageError):
    """An input that is not any more what it was when the run began. Its text names the file or the tensor."""


class SolverError(RunError, RuntimeError):
    """A projection cannot be solved. Its text names the projection and what was tried."""


class OutOfMemory(RunError, RuntimeError):
    """A worker's device has too little memory. Its text names the worker, the layer and what would help."""


class TrainingError(RunError, RuntimeError):
    """A training run cannot continue. Its text names the step, or the resource that is too small."""


class ConversionError(RunError, RuntimeError):
    """A converter or a quantisation has not made its model. Its text names the program and the reason it gave."""


class WorkerLost(RunError, RuntimeError):
    """A worker's process or node died. The driver restarts on the remaining workers."""


class Stopped(KeyboardInterrupt):
    """A signal was received that stops the process. Only the command line catches it.

    It is a KeyboardInterrupt because no other exception raised in a signal handler interrupts `ray.get` and `ray.wait`.
    """

    def __init__(self, number: int = signal.SIGTERM) -> None:
        super().__init__(number)
        self.signal = signal.Signals(number)
