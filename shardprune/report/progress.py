"""Progress of long steps: a bar on a terminal, plain lines elsewhere."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from shardprune.printable import printable, without_credentials
from shardprune.report.console import PlainConsole
from shardprune.report.events import Events

QUIET_SECONDS = 5.0  # between two plain lines of one step
SIGN_SECONDS = 60.0  # without a plain line, after which a step says that it is still at the same part


class Step:
    """A step with a known number of parts; thread-safe."""

    def __init__(self, label: str, total: int, reporter: "Reporter") -> None:
        self.label, self.total, self.done = printable(label), total, 0
        self.detail = ""
        self._reporter = reporter
        self._lock = threading.Lock()
        self._started = self._spoke = time.monotonic()

    def advance(self, count: int = 1) -> None:
        with self._lock:
            self.done += count
            self._reporter.show(self)

    def describe(self, detail: str) -> None:
        """Set the description of the current part, such as `layer 3/8`."""
        with self._lock:
            self.detail = printable(detail)
            self._reporter.show(self)

    def record(self, event: str, **fields: Any) -> None:
        """Emit an event of this step."""
        self._reporter.events.emit(event, **fields)

    def say(self, text: str) -> None:
        self._reporter.say(text)

    def position(self) -> dict[str, Any]:
        """Return the fields of the event `progress`."""
        return {"label": self.label, "detail": self.detail, "done": self.done, "total": self.total}

    def line(self) -> str:
        elapsed = time.monotonic() - self._started
        share = self.done / self.total if self.total else 1.0
        left = f", {clock_time(elapsed * (1 - share) / share)} left" if 0 < share < 1 else ""
        detail = f"  {self.detail}" if self.detail else ""
        return f"{self.label}{detail}  {self.done}/{self.total}  {share:.0%}  {clock_time(elapsed)}{left}"

    def due(self, seconds: float = QUIET_SECONDS) -> bool:
        """Return whether a plain line is due: at most one in so many seconds."""
        now = time.monotonic()
        if now - self._spoke < seconds:
            return False
        self._spoke = now
        return True


class Reporter:
    """The destination of a run's progress and messages; `events` receives its events."""

    def __init__(self, console: Console | None = None, quiet: bool = False) -> None:
        self.console = console or PlainConsole(stderr=True)
        self.quiet = quiet
        self.events = Events()
        self._bars: Progress | None = None
        self._tasks: dict[int, object] = {}

    def say(self, text: str) -> None:
        """Print one line."""
        if not self.quiet:
            self.console.print(
                printable(without_credentials(text)), highlight=False, markup=False, emoji=False, soft_wrap=True
            )

    @contextmanager
    def step(self, label: str, total: int) -> Iterator[Step]:
        """Show a step until the block ends."""
        with self._shown(label, total) as step:
            outer, self.events.position = self.events.position, step.position
            step.record("progress", **step.position())
            try:
                yield step
            finally:
                self.events.position = outer
            step.record("progress", **step.position())

    @contextmanager
    def _shown(self, label: str, total: int) -> Iterator[Step]:
        step = Step(label, total, self)
        if self.quiet:
            yield step
        elif self.console.is_terminal:
            columns = (
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
            )
            with Progress(*columns, console=self.console) as self._bars:
                self._tasks[id(step)] = self._bars.add_task(step.label, total=total)
                try:
                    yield step
                finally:
                    self._bars = None
        else:
            over = threading.Event()
            threading.Thread(target=self._tell, args=(step, over), daemon=True).start()
            try:
                yield step
            finally:
                over.set()
            self.say(step.line())

    def _tell(self, step: Step, over: threading.Event) -> None:
        """Give signs of life of a step whose parts take long, until it is over."""
        while not over.wait(SIGN_SECONDS):
            if step.due(SIGN_SECONDS):
                self.say(step.line())

    def show(self, step: Step) -> None:
        if self._bars is not None:
            label = f"{step.label}  {step.detail}" if step.detail else step.label
            self._bars.update(self._tasks[id(step)], completed=step.done, description=label)  # type: ignore[arg-type]
        elif not self.quiet and step.due():
            self.say(step.line())


def clock_time(seconds: float) -> str:
    """Format seconds as hours, minutes and seconds."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
