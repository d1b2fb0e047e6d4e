"""The options for scoring structures and candidates."""

from dataclasses import dataclass
from typing import Literal

Score = Literal["amp", "outlier", "obs"]
Criterion = Literal["cosine", "kl", "perplexity"]  # what whole candidates are scored by


@dataclass(frozen=True)
class Scoring:
    """The score of structures, and whether remaining columns are corrected.

    `amp`: activity of a structure (MoP, arXiv 2602.06127). `outlier`: share of outliers of Wanda's metric, those above
    `outlier_m` times the layer's mean. `obs`: output error after the structure's removal.
    """

    score: Score
    correction: bool
    outlier_m: float

    def needs_gram(self, measure_error: bool) -> bool:
        """Return whether full second moments of the output projections' inputs are needed."""
        return self.correction or self.score == "obs" or measure_error
