"""The options of mask rebuilding; `barber` implements it."""

from dataclasses import dataclass
from typing import Literal

Granularity = Literal["row", "column", "projection", "block"]
Metric = Literal["weight-gradient", "weight", "gradient"]


@dataclass(frozen=True)
class Rebuilding:
    """Options of mask rebuilding: within which unit weights are paired, by which score, and the fraction of pairs to
    swap. With `keep_corrected`, kept weights keep the values that the pruning method gave them.
    """

    threshold: float
    granularity: Granularity
    metric: Metric
    keep_corrected: bool

    @property
    def needs_gradients(self) -> bool:
        return self.threshold > 0 and self.metric != "weight"
