"""Records of finished layers: a layer file says in its header, as JSON, what was done to its layer.

A worker makes the reports, the driver puts them together, and whoever reads the file gets the same classes back.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class ProjectionReport:
    """A projection as it was written.

    `target` is the fraction of zeros that was asked for; `zeros` of its `weights` are counted on the tensor written,
    `zeros_before` on the dense one. `error` is ||XW - XW'||^2 / ||XW||^2 where it was measured, `outliers` the
    percentage of outliers where the allocation looked at them, `pattern` its N:M. The solver needed so many `retries`
    and ended with the `damping`, where it factorises; `sweep` is the way of its steps over columns (`kernel` or
    `recursion`), where it has any. `update` is the way of a masked low-rank update (`kernel` or `products`), where
    there was one, and `zeros_kept` of the zeros before are still zero, where that was counted.
    """

    layer: int
    name: str
    target: float
    zeros: int
    zeros_before: int
    weights: int
    pattern: str | None = None
    retries: int = 0
    damping: float | None = None
    sweep: str | None = None
    outliers: float | None = None
    error: float | None = None
    update: str | None = None
    zeros_kept: int | None = None

    @property
    def achieved(self) -> float:
        """The fraction of zeros."""
        return self.zeros / self.weights


@dataclass(frozen=True)
class BlockReport:
    """A block whose masks were rebuilt: the pairs of weights swapped, and ||dense - sparse||^2 / ||dense||^2 of its
    output over the calibration data before and after, where it was measured."""

    layer: int
    block: str
    swaps: int
    error_before: float | None = None
    error_after: float | None = None


@dataclass(frozen=True)
class KeptStructures:
    """Structures that a layer has kept: indices of key/value `groups` and `neurons`. `errors` are the relative output
    errors of the output projections where they were measured, `retries` those of the solver."""

    groups: tuple[int, ...]
    neurons: tuple[int, ...]
    errors: dict[str, float]
    retries: int


@dataclass(frozen=True)
class LayerSizes:
    """Numbers of weights and zeros of a layer's projections before structures were removed, and of what is left."""

    weights_before: int
    zeros_before: int
    weights: int
    zeros: int


@dataclass(frozen=True)
class LayerRecord:
    """A finished layer: `projections` where weights became zero, `blocks` where masks were rebuilt, its percentage of
    `outliers` where the allocation looked at it; what it `kept` and its `sizes` where structures were removed."""

    layer: int
    projections: tuple[ProjectionReport, ...] = ()
    blocks: tuple[BlockReport, ...] = ()
    outliers: float | None = None
    kept: KeptStructures | None = None
    sizes: LayerSizes | None = None

    @property
    def zeros(self) -> int:
        """The zeros of all projections."""
        return self.sizes.zeros if self.sizes else sum(report.zeros for report in self.projections)

    @property
    def sparsity(self) -> float | None:
        """The fraction of zeros over all projections; None where no weights became zero."""
        weights = sum(report.weights for report in self.projections)
        return self.zeros / weights if weights else None

    @property
    def error(self) -> float | None:
        """The mean relative output error of the projections where it was measured."""
        errors = [report.error for report in self.projections if report.error is not None]
        if self.kept:
            errors += self.kept.errors.values()
        return sum(errors) / len(errors) if errors else None

    def plain(self) -> dict[str, Any]:
        """The record as plain values, ready for JSON."""
        return asdict(self)

    @classmethod
    def read(cls, fields: Mapping[str, Any]) -> "LayerRecord":
        """Return the record that `plain` gave these values of.

        Raises:
            TypeError, ValueError, KeyError: they are those of no record of this version.
        """
        values = dict(fields)
        kept, sizes = values.pop("kept"), values.pop("sizes")
        return cls(
            projections=tuple(ProjectionReport(**report) for report in values.pop("projections")),
            blocks=tuple(BlockReport(**report) for report in values.pop("blocks")),
            kept=None if kept is None else _kept(**kept),
            sizes=None if sizes is None else LayerSizes(**sizes),
            **values,
        )


def _kept(groups: list[int], neurons: list[int], errors: dict[str, float], retries: int) -> KeptStructures:
    return KeptStructures(tuple(groups), tuple(neurons), errors, retries)
