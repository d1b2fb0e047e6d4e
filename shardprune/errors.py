"""The two ways a run can fail that are not a defect in the program."""


class InputError(ValueError):
    """Bad input, found before any work. Its text names the field, the value and what is allowed.

    The command line prints it as one line and exits with code 2.
    """

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"{field}: {problem}")
        self.field = field


class SolverError(RuntimeError):
    """A projection cannot be solved. Its text names the projection and what was tried."""


class WorkerLost(RuntimeError):
    """A worker's process or node died. The driver places new workers and goes on."""
