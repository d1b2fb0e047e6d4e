"""Steps of a training on their way to the tracker that its recipe names."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

from shardprune.errors import first_line
from shardprune.recovery.loss_log import Loss, Losses
from shardprune.recovery.spec import DecidedRecipe
from shardprune.report.progress import Reporter
from shardprune.report.tracking import Tracker, open_tracker

Follow = Callable[[Sequence[Loss]], None]


@contextmanager
def tracked(recipe: DecidedRecipe, fingerprint: str, losses: Losses, reporter: Reporter) -> Iterator[Follow]:
    """Open the tracker of a training, and yield what takes all steps that there are, whenever there may be more.

    Each step is reported once, from the first one that is not in the loss log yet. A tracker that fails ends neither
    the training nor its own run's earlier steps: that is said, and no more is reported.

    Raises:
        InputError: the tracker cannot be opened.
    """
    if recipe.track is None:
        yield lambda known: None
        return
    settings = recipe.model_dump(mode="json", include=set(type(recipe).identifying_fields()))
    tracker = open_tracker(recipe.track, recipe.out, fingerprint, settings)
    known = losses.read()
    steps = _Steps(recipe.track, tracker, known[-1].step if known else 0, reporter)
    try:
        yield steps.report
    finally:
        steps.close()


class _Steps:
    def __init__(self, track: str, tracker: Tracker, last: int, reporter: Reporter) -> None:
        self._track, self._tracker, self._last, self._reporter = track, tracker, last, reporter
        self._failed = False

    def report(self, known: Sequence[Loss]) -> None:
        for loss in known:
            if loss.step > self._last and not self._failed:
                self._try(partial(self._tracker.log, loss.step, _values(loss)))
                self._last = loss.step

    def close(self) -> None:
        self._try(self._tracker.close)

    def _try(self, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception as error:  # each tracker has errors of its own, of files and of the network
            if not self._failed:
                self._reporter.say(f"{self._track} gets no more steps: {first_line(error)}")
            self._failed = True


def _values(loss: Loss) -> dict[str, float]:
    """Return what a tracker shows of a step."""
    values = {
        "loss": loss.loss,
        "learning_rate": loss.learning_rate,
        "gradient_norm": loss.gradient_norm,
        "tokens_per_second": loss.tokens / loss.seconds,
        "step_seconds": loss.seconds,
        "peak_gb": loss.peak_bytes / 1e9,
    }
    return values if loss.held_out is None else {**values, "held_out_loss": loss.held_out}
