"""The end of a run: whether it has been reached before, and what it took to get there."""

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from shardprune.report.clock import Clock
from shardprune.report.progress import Reporter
from shardprune.report.result import Perplexity, Result, WorkerResult
from shardprune.storage.journal import Journal
from shardprune.storage.windows import tokens_hash


def done_already(
    journal: Journal, state: dict[str, Any], evaluations: dict[str, Tensor], reporter: Reporter
) -> Result | None:
    """The result of a finished run that lacks nothing of what is asked for.

    Args:
        state: what the output directory holds.

    Raises:
        InputError: it lacks something, which cannot be written.
    """
    if "version" not in state:
        return None
    result = Result(**state)
    measured = {source: record.tokens_sha256 for source, record in result.perplexity.items()}
    wanted = {source: tokens_hash(windows) for source, windows in evaluations.items()}
    if not wanted.items() <= measured.items():
        journal.folder.check_writable()
        return None
    reporter.say(f"{journal.folder.url} is finished already")
    return result


def costs(
    clock: Clock, workers: list[dict[str, Any]], previous: Result | None
) -> tuple[dict[str, float], list[WorkerResult]]:
    """What a run took by phase, the slowest worker's reading and writing included, and who did it.

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
    """The same of a finished run to which measurements were added."""
    evaluate = clock.total().get("evaluate", 0.0) + previous.seconds.get("evaluate", 0.0)
    return {**previous.seconds, "evaluate": evaluate}, previous.workers


def finish(journal: Journal, result: Result, previous: Result | None) -> Result:
    """Write a run's result, last of all; what `shardprune evaluate` has added to an earlier one stays."""
    if previous:
        result = result.model_copy(update={"evaluation": previous.evaluation})
    journal.finish(result.as_json())
    return result


def with_peaks_of(workers: list[WorkerResult], earlier: list[WorkerResult]) -> list[WorkerResult]:
    """The workers of the second of two runs, with what those in the same places took at their peak in both."""
    peaks = {(worker.shard, worker.replica): worker.peak_bytes for worker in earlier}
    return [
        worker.model_copy(update={"peak_bytes": max(worker.peak_bytes, peaks.get((worker.shard, worker.replica), 0))})
        for worker in workers
    ]


Record = dict[str, Any]  # seqlen, windows, tokens_sha256, and `before` and `after` as far as they are known


class Measurements:
    """Perplexities by source.

    Args:
        evaluations: windows [windows, seqlen] by source, which a run is to be measured on.
        records: what is known from earlier; of a source that has another text now it counts for nothing.
    """

    def __init__(self, evaluations: dict[str, Tensor], records: dict[str, Record]) -> None:
        self._evaluations = evaluations
        self.records = dict(records)

    def missing(self, when: str) -> Iterator[tuple[Tensor, Record]]:
        """Windows that have not been measured, `before` or `after`, and the record that takes the number."""
        for source, windows in self._evaluations.items():
            tokens = {"seqlen": windows.shape[1], "windows": len(windows), "tokens_sha256": tokens_hash(windows)}
            if not tokens.items() <= self.records.get(source, {}).items():
                self.records[source] = tokens
            record = self.records[source]
            if record.get(when) is None:
                yield windows, record

    def adopt(self, records: dict[str, Record]) -> None:
        """Take over what another run has measured, where it is not known here of the same text."""
        for source, record in records.items():
            own = self.records.get(source, {})
            same = own.get("tokens_sha256") == record["tokens_sha256"]
            self.records[source] = record | own if same else record

    def results(self) -> dict[str, Perplexity]:
        return {source: Perplexity(**record) for source, record in self.records.items()}
