"""The process of a command: the ways it ends, each as one line at most and an exit code."""

import sys
from collections.abc import Callable
from typing import NoReturn

from shardprune.errors import InputError, RunError, Stopped
from shardprune.printable import message
from shardprune.signals import NAMES, quick_to_end, stoppable
from shardprune.standard_streams import outputs


def be(command: Callable[[], int]) -> NoReturn:
    """Be the process of a command that imports all else itself: signals have their meaning before and after it too."""
    quick_to_end()
    run(command)


def run(command: Callable[[], int]) -> NoReturn:
    """Carry out a command and end the process with the exit code that it returns.

    Exit code 2 with one line: bad input. 1 with one line: a run cannot go on, or a product that is text cannot be
    printed. 1 with a traceback: a bug. 130, 143 and 129 with one line: Ctrl-C, SIGTERM, SIGHUP.
    """
    with outputs() as (out, _):
        try:
            with stoppable():
                code = command()
        except InputError as error:
            code = failed(str(error), 2)
        except RunError as error:
            code = failed(str(error), 1)
        except Stopped as stop:
            code = failed(_stopped(NAMES[stop.signal]), 128 + stop.signal)
        except KeyboardInterrupt:
            code = failed(_stopped("Ctrl-C"), 130)
        out.flush()
        if out.failure and code == 0:
            code = failed(f"standard output cannot be written: {out.failure}", 1)
    sys.exit(code)


def _stopped(reason: str) -> str:
    return f"stopped by {reason}; what a run has finished is kept, and the same command goes on from there"


def failed(text: str, code: int) -> int:
    """Print an error as one line, and return the exit code."""
    print(f"error: {message(text)}", file=sys.stderr)
    return code
