"""Errors that a run can end with and that are not defects of the program."""

import re
import signal


def without_credentials(text: str) -> str:
    """Remove user names, passwords and query strings from the URLs in a text."""
    return re.sub(r"(\w+://[^\s'\"?]*)\?[^\s'\"]*", r"\1", re.sub(r"(\w+://)[^\s'\"/@]*@", r"\1", text))


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text, or the name of its class if it has no text."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


class FieldError(Exception):
    """An error about one field of a recipe, without credentials in its text."""

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"{field}: {without_credentials(problem)}")
        self.field = field
        self.problem = problem

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


class SolverError(RuntimeError):
    """A projection cannot be solved. Its text names the projection and what was tried."""


class OutOfMemory(RuntimeError):
    """A worker's device has too little memory. Its text names the worker, the layer and what would help."""


class TrainingError(RuntimeError):
    """A training run cannot continue. Its text names the step, or the resource that is too small."""


class WorkerLost(RuntimeError):
    """A worker's process or node died. The driver restarts on the remaining workers."""


class Stopped(KeyboardInterrupt):
    """A signal was received that stops the process. Only the command line catches it.

    It is a KeyboardInterrupt because no other exception raised in a signal handler interrupts `ray.get` and `ray.wait`.
    """

    def __init__(self, number: int = signal.SIGTERM) -> None:
        super().__init__(number)
        self.signal = signal.Signals(number)
