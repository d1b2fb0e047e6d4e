"""Commands whose processes are forks, and that say where they are while they go on.

A command starts in the process of `tests.support.forking`, which has imported what it needs; it is carried out as
`shardprune` carries it out, and writes a line to a file whenever a phase begins or a step gets further.
"""

import os
import signal
import sys
import time
from itertools import pairwise
from pathlib import Path

import psutil

from tests.support.forking import fork

PAUSE = 0.002  # seconds between two looks at a command


def is_phase(told: str) -> bool:
    """Whether what a command said is that a phase began."""
    return "/" not in told and not told.startswith("code ")


class Driver:
    """A command under way.

    Args:
        words: of the command line.
        place: folder for what it says and prints; emptied before.
    """

    def __init__(self, words: list[str], place: Path) -> None:
        place.mkdir(parents=True, exist_ok=True)
        self.told_file, self._printed, self._said = place / "told", place / "stdout", place / "stderr"
        self.told_file.write_text("")
        environment = {**os.environ, "COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"}
        with open(os.devnull) as nothing, self._printed.open("w") as output, self._said.open("w") as errors:
            streams = [nothing.fileno(), output.fileno(), errors.fileno()]
            self._connection = fork([__file__, str(self.told_file), *words], streams, environment)
        self._connection.setblocking(False)
        self._process: psutil.Process | None = None

    def told(self) -> list[str]:
        """What it has said so far: phases that began, steps that got further."""
        return [line.partition(" ")[2] for line in self.told_file.read_text().splitlines()[1:]]

    def phases(self) -> list[tuple[str, float]]:
        """The phases that began, in order, and the seconds until the next one, or the end."""
        lines = [line.split(" ", 1) for line in self.told_file.read_text().splitlines()[1:]]
        begun = [(float(at), what) for at, what in lines if is_phase(what) or what.startswith("code ")]
        return [(phase, end - at) for (at, phase), (end, _) in pairwise(begun)]

    @property
    def process(self) -> psutil.Process:
        """Its process, as soon as there is one."""
        while self._process is None:
            first = self.told_file.read_text().partition("\n")
            if first[1]:
                self._process = psutil.Process(int(first[0]))
            else:
                time.sleep(PAUSE)
        return self._process

    def over(self) -> bool:
        """Whether it has ended, its standard streams closed."""
        try:
            return self._connection.recv(1) == b""
        except BlockingIOError:
            return False
        except ConnectionResetError:
            return True

    def wait(self, seconds: float) -> bool:
        """Wait for its end; return whether it came."""
        end = time.monotonic() + seconds
        while not self.over():
            if time.monotonic() > end:
                return False
            time.sleep(PAUSE)
        self._connection.close()
        return True

    def send(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    @property
    def code(self) -> int | None:
        """Its exit code; None if it was killed before it had one."""
        last = self.told()[-1:] or [""]
        return int(last[0].removeprefix("code ")) if last[0].startswith("code ") else None

    def lines(self) -> list[str]:
        """What it printed on standard error."""
        return self._said.read_text(errors="replace").splitlines()


def main() -> None:
    """Carry out a command, saying where it is."""
    file = open(sys.argv[1], "a", buffering=1)  # noqa: SIM115  it stays open to the end of the process
    file.write(f"{os.getpid()}\n")

    def tell(what: str) -> None:
        file.write(f"{time.monotonic():.3f} {what}\n")

    from shardprune.cli import main as command
    from shardprune.report.events import Events
    from shardprune.report.progress import Reporter

    emit, show = Events.emit, Reporter.show

    def emitting(self, event, **fields):
        emit(self, event, **fields)
        if event == "begin":
            tell(fields["phase"])

    def showing(self, step):
        show(self, step)
        tell(f"{step.label} {step.done}/{step.total}")

    Events.emit, Reporter.show = emitting, showing  # type: ignore[method-assign]
    try:
        command(sys.argv[2:])
    except SystemExit as end:
        tell(f"code {end.code if end.code is not None else 0}")


if __name__ == "__main__":
    main()
