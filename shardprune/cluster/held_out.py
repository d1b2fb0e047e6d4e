"""Steps that are meant to improve a layer, each judged by the held-out calibration windows: it stays only if the
layer's output comes nearer to the dense one on them.

A new step is a function that changes projections of the layer on every replica, passed to `HeldOut.improve`.
"""

from collections.abc import Callable, Sequence
from typing import TypeVar

from shardprune.cluster.layer_in_work import LayerInWork
from shardprune.cluster.passes import in_wave_order
from shardprune.shard.improving_worker import ImprovingWorker
from shardprune.storage.records import ImprovementReport

T = TypeVar("T")


class HeldOut:
    """The held-out windows of a layer in work, and the steps that they have judged.

    Made before anything in the layer changes: the dense activations of these windows become the dense outputs.

    Attributes:
        error: of the layer's output on them when it was last known, ||output - dense output||^2 / ||dense output -
            dense input||^2.
        reports: of the steps, in their order.
    """

    def __init__(self, layer: LayerInWork) -> None:
        self._layer, self._held = layer, layer.held_out
        self._norm = self._sum(ImprovingWorker.aim)
        self.error = 0.0
        self.reports: list[ImprovementReport] = []

    @property
    def norm(self) -> float:
        """||dense output - dense input||^2 of a held-out window, the mean; 1 where the layer does nothing."""
        windows = sum(wave.stop - wave.start for wave in self._held.waves.all)
        return self._norm / windows if self._norm > 0 else 1.0

    def measure(self) -> None:
        """Learn the error anew, where the layer has changed by something else than a step."""
        missed = self._sum(ImprovingWorker.miss)
        self.error = missed / self._norm if self._norm > 0 else missed

    def improve(self, step: str, names: Sequence[str], change: Callable[[], T]) -> T | None:
        """Carry out a step, and undo it on every replica unless the error falls; return what it returns, None where it
        is undone.

        Args:
            step: its name in records.
            names: the projections that `change` changes.
        """
        layer, before = self._layer, self.error
        layer.ask_all(ImprovingWorker.remember, tuple(names))
        changed = change()
        self.measure()
        after, kept = self.error, self.error < before  # not where it is not a number
        if not kept:
            layer.ask_all(ImprovingWorker.put_back)
            self.error = before
        self.reports.append(ImprovementReport(layer.layer, step, tuple(names), before, after, kept))
        return changed if kept else None

    def _sum(self, verb: Callable[..., list[float]]) -> float:
        """Return the sum of a verb's values for all sequences, in the order of the windows: it does not depend on how
        these are spread over replicas."""
        waves = in_wave_order(self._held.over_waves(verb))
        return sum(value for values in waves for value in values)
