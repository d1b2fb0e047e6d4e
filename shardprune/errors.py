"""The ways a run can fail that are not a defect in the program."""

import re


def without_credentials(text: str) -> str:
    """A text whose URLs have lost user names, passwords and query strings."""
    return re.sub(r"(\w+://[^\s'\"?]*)\?[^\s'\"]*", r"\1", re.sub(r"(\w+://)[^\s'\"/@]*@", r"\1", text))


def first_line(error: BaseException) -> str:
    """An error's text, or its first line where it has several."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


class InputError(ValueError):
    """Bad input, found before any work. Its text names the field, the value and what is allowed.

    The command line prints it as one line and exits with code 2.
    """

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"{field}: {without_credentials(problem)}")
        self.field = field
        self.problem = problem

    def __reduce__(self) -> tuple[type["InputError"], tuple[str, str]]:
        return InputError, (self.field, self.problem)


class StorageError(RuntimeError):
    """Storage that cannot be read or written, however long one waits. Its text names the field that says where it is,
    the file and the reason."""

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"{field}: {without_credentials(problem)}")
        self.field = field
        self.problem = problem

    def __reduce__(self) -> tuple[type["StorageError"], tuple[str, str]]:
        return StorageError, (self.field, self.problem)


class SolverError(RuntimeError):
    """A projection cannot be solved. Its text names the projection and what was tried."""


class TrainingError(RuntimeError):
    """A training cannot go on. Its text names the step or what there is too little of."""


class WorkerLost(RuntimeError):
    """A worker's process or node died. The driver places new workers and goes on."""


class Stopped(KeyboardInterrupt):
    """SIGTERM has come. Nothing but the command line catches it.

    It is a KeyboardInterrupt, because `ray.get` and `ray.wait` give way to no other exception of a signal's handler.
    """
