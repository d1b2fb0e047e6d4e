"""The state of a run in its output: `run.json` while it is under way, `result.json` at its end."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from shardprune.commands.model_card import leave_card
from shardprune.errors import InputError, StorageError
from shardprune.evaluation.record import evaluation_in
from shardprune.model.allocation_file import AllocatedShare
from shardprune.model.checkpoint import Checkpoint
from shardprune.model.sources import SourceState
from shardprune.report.clock import Clock
from shardprune.report.progress import Reporter
from shardprune.report.result import Evaluation, Iteration, Perplexity, Result, WorkerResult
from shardprune.solvers.outliers import Outliers
from shardprune.storage.journal import Earlier, Journal
from shardprune.storage.json_file import MaybeMeasurement, fitting
from shardprune.storage.malformed import located
from shardprune.storage.manifest import FileRecord, manifest_faults, manifest_of
from shardprune.storage.output_names import BESIDE, RESULT, STATE, WRITTEN
from shardprune.storage.owner import Ownership, one_at_a_time, owned
from shardprune.storage.windows import tokens_hash

When = Literal["before", "after"]


class Measured(BaseModel):
    """Perplexity on one text, as far as it is known: before the run, and after it."""

    seqlen: int
    windows: int
    tokens_sha256: str
    before: MaybeMeasurement = None
    after: MaybeMeasurement = None


class ZeroCount(BaseModel):
    """The `count` of zeros among the `weights` of all projections."""

    count: Annotated[int, Field(ge=0)]
    weights: Annotated[int, Field(gt=0)]


class RunFile(BaseModel):
    """The content of `run.json`: the recipe with every choice made, and all that a later attempt must not do anew.

    Fields of one command: `outliers` of prune, by layer, and the `curves` of all projections; `path` and `saved` (the
    folder with the layers of the last iteration that changed them) of mop; `zeros` and `workers` (what each process
    took) of recover. `inputs` are the checkpoints that are read, by the recipe's fields that name them, as they were
    when the run began. `evaluation` is what `shardprune evaluate` has measured of a run that was finished, and goes on.
    `self_sha256` is the hash of the text that the model has written for its calibration.
    """

    model_config = ConfigDict(extra="forbid")

    fingerprint: str
    recipe: dict[str, Any] = {}
    perplexity: dict[str, Measured] = {}
    restarts: Annotated[int, Field(ge=0)] = 0
    outliers: list[Outliers] = []
    curves: list[AllocatedShare] = []
    path: list[Iteration] = []
    saved: Annotated[str, Field(pattern=r"^(iteration|layers)-\d+$")] | None = None
    zeros: ZeroCount | None = None
    workers: list[dict[str, Any]] = []
    inputs: dict[str, SourceState] = {}
    evaluation: Evaluation | None = None
    self_sha256: str | None = None


class RunState:
    """The knowledge of a run about itself, kept in its output as soon as it is known.

    Args:
        earlier: what the output holds of the run.
        recipe: for files that others read.
        evaluations: windows [windows, seqlen] by source, on which perplexity is to be measured.
        inputs: the checkpoints that are read, by the recipe's fields that name them.

    Raises:
        InputError: the output holds a run of another version, or an input is not the one with which the run began.
    """

    def __init__(
        self,
        journal: Journal,
        earlier: Earlier,
        recipe: dict[str, Any],
        evaluations: dict[str, Tensor],
        inputs: Mapping[str, Checkpoint],
    ) -> None:
        self.journal = journal
        self.previous: Result | None = None  # of an earlier run, to which this one may only add measurements
        self.reopened: Result | None = None  # of a finished run some of whose files are made again
        self.resumed = bool(earlier)
        self._evaluations = evaluations
        if earlier.result is not None:
            with located("out", f"{journal.folder.url}/{RESULT}"):
                self.previous = fitting(earlier.result, Result)
            self.known = _known_of(self.previous)
        else:
            self.known = run_file(journal, earlier)
        self.known.recipe = recipe
        self._inputs = inputs
        self._ownership: Ownership | None = None
        if self.previous is None:
            self._resume_inputs()

    def _resume_inputs(self) -> None:
        """Compare the inputs with what earlier attempts knew of them."""
        for field, checkpoint in self._inputs.items():
            if field in self.known.inputs:
                checkpoint.source.resume(self.known.inputs[field], self._unread(checkpoint))

    def _unread(self, checkpoint: Checkpoint) -> set[str]:
        """Return the tensors, by their names in the files, from which no finished layer was made."""
        done: set[str] = set()
        for layer in self.journal.finished():
            done |= self.journal.layer_tensors(layer)
        return {str(checkpoint.place(name)) for name in checkpoint.entries if checkpoint.stored_name(name) not in done}

    def learn(self, found: Iterable[Mapping[str, Mapping[str, str]]]) -> None:
        """Record the digests of tensors that workers have read, by the inputs' fields and the tensors' names.

        Raises:
            InputChanged: one was not what it was for another worker, or earlier.
        """
        for digests in found:
            for field, own in digests.items():
                self._inputs[field].source.learn(own)
        self.save()

    def reads(self, checkpoint: Checkpoint) -> bool:
        """Return whether a checkpoint is one of the inputs."""
        return any(own is checkpoint for own in self._inputs.values())

    def keep_text(self, tokens: Tensor) -> None:
        """Record which text the model has written for its calibration.

        Raises:
            InputError: it is not the one that finished layers have seen.
        """
        written = tokens_hash(tokens)
        if self.known.self_sha256 not in (None, written) and self.journal.finished():
            reason = "the calibration text that its finished layers have seen is lost, and the model now writes another"
            raise InputError("out", f"{self.journal.folder.url}: {reason}; choose an empty directory")
        self.known.self_sha256 = written
        self.save()

    def check_inputs(self) -> None:
        """Check that the inputs are still the files that were opened.

        Raises:
            InputChanged: one is not.
        """
        for checkpoint in self._inputs.values():
            checkpoint.check_unchanged()

    def done(self, reporter: Reporter, lasting: Callable[[str], bool] = lambda name: False) -> Result | None:
        """Return the result of a finished run that lacks nothing of what is asked for, and whose files are what they
        were when it ended. Other files are made again: the run counts as unfinished then.

        Args:
            lasting: whether a file of the output, by its name, cannot be made again.

        Raises:
            InputError: it lacks something, which cannot be written or cannot be made again.
        """
        if self.previous is None:
            return None
        folder = self.journal.folder
        # The text that the model has written is of no use to a run that is finished.
        files = {name: record for name, record in self.previous.files.items() if name not in WRITTEN}
        if faults := manifest_faults(folder, files):
            for name, fault in faults.items():
                if lasting(name):
                    raise InputError("out", f"{folder.url} is not whole: {name} {fault}; choose an empty directory")
            self._reopen(faults, reporter)
            return None
        measured = {record.tokens_sha256 for record in self.previous.perplexity.values()}
        if not measured.issuperset(map(tokens_hash, self._evaluations.values())):
            self.journal.folder.check_writable()
            return None
        reporter.say(f"{self.journal.folder.url} is finished already")
        return self.previous

    def _reopen(self, faults: Mapping[str, str], reporter: Reporter) -> None:
        """Make a finished run one that goes on, without the files that are not what they were."""
        folder, layers = self.journal.folder, {self.journal.layer_file(layer) for layer in range(self.journal.layers)}
        folder.check_writable()
        self.previous, self.reopened = None, self.previous
        if not layers.isdisjoint(faults):
            for measured in self.known.perplexity.values():
                measured.after = None
        self.save()  # first: with it the output holds a run that is not finished
        for name, fault in faults.items():
            reporter.say(f"{folder.url}/{name} {fault}: it is made again")
            if name in layers:
                folder.remove(name)

    @contextmanager
    def running(self, reporter: Reporter, **facts: Any) -> Iterator[None]:
        """Claim the output and record what happens while the block lasts.

        Args:
            facts: of the event `run`.

        Raises:
            InputError: another process drives a run there.
        """
        folder = self.journal.folder
        with owned(folder) as self._ownership:
            folder.remove_partial()
            self.save()
            with self.journal.claimed(self.resumed), reporter.events.recorded(folder, **facts):
                yield

    def save(self) -> None:
        """Record what is known, but for what a finished run's result says already.

        Raises:
            StorageError: the output is not this run's any more.
        """
        if self._ownership:
            self._ownership.check()
        if self.previous is None:
            for field, checkpoint in self._inputs.items():
                first = self.known.inputs.setdefault(field, checkpoint.state())  # stamps stay those of the beginning
                self.known.inputs[field] = replace(first, digests=dict(checkpoint.source.digests))
            self.journal.save(self.known.model_dump(mode="json", exclude_none=True))

    def lost(self) -> None:
        """Record that workers were lost."""
        self.known.restarts += 1
        self.save()

    def finish(self, result: Result, kept: Iterable[str] = ()) -> Result:
        """Write the result, last of all; what `shardprune evaluate` has added to an earlier one stays.

        Args:
            kept: folders in the output that hold models, too.

        Raises:
            InputChanged: an input is not the file that it was.
            StorageError: what was written cannot be read back, or the output is not this run's any more.
        """
        if self._ownership:
            self._ownership.check()
        self.check_inputs()
        files = self.previous.files if self.previous else self._written(kept)
        with one_at_a_time(self.journal.folder):  # a finished run may have been evaluated since this one began
            evaluation = evaluation_in(self.journal.folder) if self.previous else self.known.evaluation
            result = result.model_copy(update={"evaluation": evaluation, "files": files})
            leave_card(self.journal.folder, result, self.previous)
            self.journal.finish(result.as_json())
        return result

    def _written(self, kept: Iterable[str]) -> dict[str, FileRecord]:
        """Return the records of all files of the models in the output, which are opened for that, and beside them."""
        folder = self.journal.folder
        files: dict[str, FileRecord] = {}
        for place in ("", *(f"{name}/" for name in kept)):
            try:
                model = Checkpoint(f"{folder.url}/{place}".rstrip("/"), "out")
            except InputError as error:
                raise StorageError("out", error.problem) from error
            found = manifest_of(model.folder, {*model.source.stamps, *BESIDE})
            files |= {f"{place}{name}": record for name, record in found.items()}
        return files

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


def run_file(journal: Journal, earlier: Earlier) -> RunFile:
    """Return the state of an unfinished attempt, or that of a run that begins.

    Raises:
        InputError: it is none that this version writes.
    """
    with located("out", f"{journal.folder.url}/{STATE}"):
        return fitting({"fingerprint": journal.fingerprint, **(earlier.state or {})}, RunFile)


def _same_text(record: Measured, text: Measured) -> bool:
    return (record.tokens_sha256, record.seqlen) == (text.tokens_sha256, text.seqlen)


def _known_of(result: Result) -> RunFile:
    """Return what a finished run knew."""
    return RunFile(
        fingerprint=result.fingerprint,
        perplexity={source: Measured(**measured.model_dump()) for source, measured in result.perplexity.items()},
        restarts=result.restarts,
        evaluation=result.evaluation,
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
