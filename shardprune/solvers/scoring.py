"""How structures are chosen, and candidates."""

from dataclasses import dataclass
from typing import Literal

Score = Literal["amp", "outlier", "obs"]
Criterion = Literal["cosine", "kl", "perplexity"]  # what whole candidates are scored by


@dataclass(frozen=True)
class Scoring:
    """By what structures are judged, and whether the columns that stay are corrected.

    `amp`: how active a structure is (MoP, arXiv 2602.06127); `outlier`: its share of outliers of Wanda's metric, which
    are above `outlier_m` times the mean over the layer; `obs`: the output error that its removal leaves.
    """

    score: Score
    correction: bool
    outlier_m: float

    def needs_gram(self, measure_error: bool) -> bool:
        """Whether second moments of the output projections' inputs are needed whole."""
        return self.correction or self.score == "obs" or measure_error
