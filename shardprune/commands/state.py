"""The state of a run in its output: `run.json` while it is under way, `result.json` at its end."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor

from shardprune.errors import InputError
from shardprune.report.clock import Clock
from shardprune.report.progress import Reporter
from shardprune.report.result import Iteration, Perplexity, Result, WorkerResult
from shardprune.solvers.outliers import Outliers
from shardprune.storage.journal import Earlier, Journal
from shardprune.storage.windows import tokens_hash

When = Literal["before", "after"]


class Measured(BaseModel):
    """Perplexity on one text, as far as it is known: before the run, and after it."""

    seqlen: int
    windows: int
    tokens_sha256: str
    before: float | None = None
    after: float | None = None


class ZeroCount(BaseModel):
    """The `count` of zeros among the `weights` of all projections."""

    count: int
    weights: int


class RunFile(BaseModel):
    """The content of `run.json`: the recipe with every choice made, and all that a later attempt must not do anew.

    Fields of one command: `outliers` of prune, by layer; `path` and `saved` (the folder with the layers of the last
    iteration that changed them) of mop; `zeros` and `workers` (what each process took) of recover.
    """

    model_config = ConfigDict(extra="forbid")

    fingerprint: str
    recipe: dict[str, Any] = {}
    perplexity: dict[str, Measured] = {}
    restarts: int = 0
    outliers: list[Outliers] = []
    path: list[Iteration] = []
    saved: str | None = None
    zeros: ZeroCount | None = None
    workers: list[dict[str, Any]] = []


class RunState:
    """The knowledge of a run about itself, kept in its output as soon as it is known.

    Args:
        earlier: what the output holds of the run.
        recipe: for files that others read.
        evaluations: windows [windows, seqlen] by source, on which perplexity is to be measured.

    Raises:
        InputError: the output holds a run of another version.
    """

    def __init__(
        self, journal: Journal, earlier: Earlier, recipe: dict[str, Any], evaluations: dict[str, Tensor]
    ) -> None:
        self.journal = journal
        self.previous: Result | None = None  # of an earlier run, to which this one may only add measurements
        self._resumed = bool(earlier)
        self._evaluations = evaluations
        try:
            if earlier.result is not None:
                self.previous = Result(**earlier.result)
                self.known = _known_of(self.previous)
            else:
                self.known = RunFile(**{"fingerprint": journal.fingerprint, **(earlier.state or {})})
        except ValidationError as error:
            reason = "holds a run of another version of shardprune; choose an empty directory"
            raise InputError("out", f"{journal.folder.url} {reason}") from error
        self.known.recipe = recipe

    def done(self, reporter: Reporter) -> Result | None:
        """Return the result of a finished run that lacks nothing of what is asked for.

        Raises:
            InputError: it lacks something, which cannot be written.
        """
        if self.previous is None:
            return None
        measured = {record.tokens_sha256 for record in self.previous.perplexity.values()}
        if not measured.issuperset(map(tokens_hash, self._evaluations.values())):
            self.journal.folder.check_writable()
            return None
        reporter.say(f"{self.journal.folder.url} is finished already")
        return self.previous

    @contextmanager
    def running(self, reporter: Reporter, **facts: Any) -> Iterator[None]:
        """Claim the output and record what happens while the block lasts.

        Args:
            facts: of the event `run`.
        """
        self.journal.folder.remove_partial()
        self.save()
        with self.journal.claimed(self._resumed), reporter.events.recorded(self.journal.folder, **facts):
            yield

    def save(self) -> None:
        """Record what is known, but for what a finished run's result says already."""
        if self.previous is None:
            self.journal.save(self.known.model_dump(mode="json", exclude_none=True))

    def lost(self) -> None:
        """Record that workers were lost."""
        self.known.restarts += 1
        self.save()

    def finish(self, result: Result) -> Result:
        """Write the result, last of all; what `shardprune evaluate` has added to an earlier one stays."""
        if self.previous:
            result = result.model_copy(update={"evaluation": self.previous.evaluation})
        self.journal.finish(result.as_json())
        return result

    # -- perplexity -----------------------------------------------------------------------------------------------

    def missing(self, when: When) -> Iterator[tuple[str, Tensor]]:
        """Yield the sources that have not been measured, with their windows. A source that has another text now counts
        as not measured."""
        for source, windows in self._evaluations.items():
            text = Measured(seqlen=windows.shape[1], windows=len(windows), tokens_sha256=tokens_hash(windows))
            record = self.known.perplexity.get(source) or self._of_another_name(source, text)
            if record is None or not _same_text(record, text):
                record = self.known.perplexity[source] = text
            if getattr(record, when) is None:
                yield source, windows

    def _of_another_name(self, source: str, text: Measured) -> Measured | None:
        """Return what is known of a text under a name that it no longer has, as where the output was moved away from
        it, and keep it under its own."""
        for name, record in self.known.perplexity.items():
            if name not in self._evaluations and _same_text(record, text):
                self.known.perplexity[source] = self.known.perplexity.pop(name)
                return record
        return None

    def keep(self, source: str, when: When, value: float) -> None:
        """Record a perplexity at once, so that no later attempt measures it again."""
        setattr(self.known.perplexity[source], when, value)
        self.save()

    def adopt(self, other: Result) -> None:
        """Take over what another run has measured, where it is not known here of the same text."""
        for source, measured in other.perplexity.items():
            record = Measured(**measured.model_dump())
            own = self.known.perplexity.get(source)
            if own is not None and own.tokens_sha256 == record.tokens_sha256:
                record = record.model_copy(update=own.model_dump(exclude_none=True))
            self.known.perplexity[source] = record
        self.known.restarts = max(self.known.restarts, other.restarts)

    def perplexities(self) -> dict[str, Perplexity]:
        """Return what was measured, by source."""
        return {source: Perplexity(**record.model_dump()) for source, record in self.known.perplexity.items()}


def _same_text(record: Measured, text: Measured) -> bool:
    return (record.tokens_sha256, record.seqlen) == (text.tokens_sha256, text.seqlen)


def _known_of(result: Result) -> RunFile:
    """Return what a finished run knew."""
    return RunFile(
        fingerprint=result.fingerprint,
        perplexity={source: Measured(**measured.model_dump()) for source, measured in result.perplexity.items()},
        restarts=result.restarts,
        path=(result.structure.path or []) if result.structure else [],
    )


def costs(
    clock: Clock, workers: list[dict[str, Any]], previous: Result | None
) -> tuple[dict[str, float], list[WorkerResult]]:
    """Return what a run took by phase, the slowest worker's reading and writing included, and who did it.

    Args:
        workers: what each of them says of itself.
        previous: the result of an earlier run, to which this one only added measurements.
    """
    if previous:
        return costs_of_measuring(clock, previous)
    seconds = clock.total()
    for phase, key in (("load", "load_seconds"), ("write", "write_seconds")):
        seconds[phase] = round(seconds.get(phase, 0.0) + max(worker[key] for worker in workers), 3)
    return seconds, [WorkerResult(**worker) for worker in workers]


def costs_of_measuring(clock: Clock, previous: Result) -> tuple[dict[str, float], list[WorkerResult]]:
    """Return what a finished run took by phase, and the measurements that were added to it; and who did it."""
    evaluate = clock.total().get("evaluate", 0.0) + previous.seconds.get("evaluate", 0.0)
    return {**previous.seconds, "evaluate": evaluate}, previous.workers


def with_peaks_of(workers: list[WorkerResult], earlier: list[WorkerResult]) -> list[WorkerResult]:
    """Return the workers of the second of two runs, with what those in the same places took at their peak in both."""
    peaks = {(worker.shard, worker.replica): worker.peak_bytes for worker in earlier}
    return [
        worker.model_copy(update={"peak_bytes": max(worker.peak_bytes, peaks.get((worker.shard, worker.replica), 0))})
        for worker in workers
    ]
