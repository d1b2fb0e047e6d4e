"""The processes of a job, and their output, ends and signals as events."""

import signal
import subprocess
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from queue import SimpleQueue

# Steps share the job's CPUs, memory and GPUs without binding processes to parts of them, and survive the loss of a node
# or the end of one process.
SHARING = ("--overlap", "--cpu-bind=quiet,none", "--mpi=none", "--ntasks-per-node=1")
END = "end"
ENDURING = ("--no-kill", "--kill-on-bad-exit=0", "--wait=0")


@dataclass(frozen=True)
class Line:
    """A process has written a line to standard output."""

    process: "Process"
    text: str


@dataclass(frozen=True)
class Ended:
    """A process has ended."""

    process: "Process"


@dataclass(frozen=True)
class Signalled:
    """This process was sent a signal."""

    number: signal.Signals


Event = Line | Ended | Signalled
Mailbox = SimpleQueue[Event]  # its `put` may be called by a signal handler during a `get`


class Process:
    """A process whose end is an event.

    Args:
        told: it has a pipe as standard input.
        heard: the lines that it writes are events; otherwise it writes where this process does.
    """

    def __init__(
        self,
        command: Sequence[str],
        events: Mailbox,
        environment: Mapping[str, str],
        told: bool = False,
        heard: bool = False,
    ) -> None:
        self._events = events
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE if told else subprocess.DEVNULL,
            stdout=subprocess.PIPE if heard else None,
            text=True,
            env=environment,
        )
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        for line in self._process.stdout or ():
            self._events.put(Line(self, line.rstrip("\n")))
        self._process.wait()
        self._events.put(Ended(self))

    @property
    def running(self) -> bool:
        return self._process.poll() is None

    @property
    def code(self) -> int:
        """The exit code as shells report it: 128 plus the signal's number if a signal ended the process."""
        code = self._process.wait()
        return code if code >= 0 else 128 - code

    def terminate(self) -> None:
        self._process.terminate()

    def kill(self) -> None:
        self._process.kill()


class Step(Process):
    """One process on each of some nodes of the job.

    They receive a first line of input, and the line END when they are to end: a signal to srun would kill them at once.
    """

    def __init__(
        self,
        where: Sequence[str],
        command: Sequence[str],
        line: str,
        events: Mailbox,
        environment: Mapping[str, str],
        heard: bool = True,
    ) -> None:
        super().__init__(["srun", *SHARING, *ENDURING, *where, *command], events, environment, told=True, heard=heard)
        self._write(line)

    def _write(self, line: str) -> None:
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # it has ended: that is an event, too
            self._process.stdin.write(f"{line}\n")
            self._process.stdin.flush()

    def terminate(self) -> None:
        self._write(END)
