"""What a recipe says about rebuilding masks; `barber` does it."""

from dataclasses import dataclass
from typing import Literal

Granularity = Literal["row", "column", "projection", "block"]
Metric = Literal["weight-gradient", "weight", "gradient"]


@dataclass(frozen=True)
class Rebuilding:
    """How masks are rebuilt: within what weights are paired, by which score, and the fraction of the pairs
    to swap. Where `keep_corrected`, weights that stay keep the values that the pruning method gave them."""

    threshold: float
    granularity: Granularity
    metric: Metric
    keep_corrected: bool

    @property
    def needs_gradients(self) -> bool:
        return self.threshold > 0 and self.metric != "weight"
