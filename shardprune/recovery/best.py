"""The lowest held-out loss of a training run, by which it stops early and chooses the weights that are written."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

from shardprune.recovery.loss_log import Loss


@dataclass(frozen=True)
class Best:
    """The lowest held-out loss so far.

    Attributes:
        step: the step after which it was measured; 0 if there is no finite one yet.
        loss: mean loss of the held-out rows, in nats per target.
        since: number of measurements since then.
    """

    step: int = 0
    loss: float = math.inf
    since: int = 0

    def after(self, step: int, loss: float) -> "Best":
        """Return the lowest loss once that of `step` is known too; of equal ones the first."""
        return Best(step, loss) if loss < self.loss else replace(self, since=self.since + 1)


def best_of(losses: Iterable[Loss]) -> Best:
    """Return the lowest held-out loss in records that are in the order of steps."""
    best = Best()
    for loss in losses:
        if loss.held_out is not None:
            best = best.after(loss.step, loss.held_out)
    return best
