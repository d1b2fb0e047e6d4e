"""Making one decoder layer narrower: which groups and neurons stay, and what its projections become."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from shardprune.errors import SolverError
from shardprune.model.families import LayerKind, Unit
from shardprune.model.saving import overflow
from shardprune.model.skeleton import projection_weight
from shardprune.model.structure.shape import Heads, Widths
from shardprune.solvers.factor import factorise
from shardprune.solvers.scoring import Scoring
from shardprune.solvers.statistics import InputStatistics, Kind, output_error
from shardprune.solvers.structures import (
    Owned,
    columns_of,
    correct,
    head_contributions,
    keep_by_error,
    keep_largest,
    mean_metric,
    neuron_activity,
    outlier_shares,
)
from shardprune.storage.records import KeptStructures

DAMPING = 0.01


@dataclass
class WidthStatistics(InputStatistics):
    """Sums over one input of a layer that is to lose structures; for AMP also how active the heads or neurons are that
    make up the input of an output projection.

    `activity` is float32 [structures], empty where no `weight` [rows, cols] of an output projection is given, whose
    structures own `size` columns each.
    """

    weight: Tensor | None = None
    size: int = 1
    activity: Tensor = field(init=False)

    def __post_init__(self) -> None:
        active = 0 if self.weight is None else self.weight.shape[1] // self.size
        self.activity = torch.zeros(active, device=self.sums.device)

    def add(self, inputs: Tensor, samples: int) -> None:
        """Add the inputs [..., cols] of one wave of `samples` sequences."""
        super().add(inputs, samples)
        if self.weight is not None and self.size == 1:
            self.activity += neuron_activity(inputs)
        elif self.weight is not None:
            self.activity += head_contributions(inputs, self.weight, self.size)

    def tensors(self) -> dict[str, Tensor]:
        return {**super().tensors(), "activity": self.activity}


@dataclass(frozen=True)
class Choice:
    """The structures of a layer that stay, by what they are made of, and the corrected weights [rows, kept columns] of
    its output projections: all that another replica needs to cut the same layer."""

    kept: dict[Unit, Tensor]
    corrected: dict[str, Tensor]

    def cpu(self) -> "Choice":
        """On the CPU, ready to travel."""
        kept = {unit: indices.cpu() for unit, indices in self.kept.items()}
        return Choice(kept, {name: weight.cpu() for name, weight in self.corrected.items()})


@dataclass(frozen=True)
class Corrected:
    """An output projection's columns that stay: the corrected `weight` [rows, kept columns] where they are corrected,
    the relative output `error` where the second moments are known, and the solver's `retries`."""

    weight: Tensor | None
    error: float | None
    retries: int


@dataclass(frozen=True)
class Narrowing:
    """One layer that is to have other widths.

    `stored` has the dtypes to which corrected weights are rounded, by projection; `label` names the layer in errors.
    """

    layer: nn.Module
    kind: LayerKind
    heads: Heads
    widths: Widths
    scoring: Scoring
    stored: Mapping[str, torch.dtype]
    label: str

    def choose(self, statistics: Mapping[str, WidthStatistics]) -> tuple["Choice", KeptStructures]:
        """Choose the structures that stay, and correct the output projections; return the choice and its report.

        Args:
            statistics: of each input of the layer, by the first projection that reads it.

        Raises:
            SolverError: names the projection.
        """
        sums = {name: statistics[names[0]] for names in self.kind.inputs for name in names}
        stay: dict[Unit, Tensor] = {}
        corrections: dict[str, Corrected] = {}
        for name, unit in self.kind.structures.columns.items():
            if not sums[name].finite:
                raise SolverError(f"{self.label} {name}: its inputs are not finite: the activations overflow")
            try:
                kept = self._choose(name, unit, sums)
                if len(kept) < self._count_before(name, unit):
                    corrections[name] = self._correct(name, kept, sums[name])
            except SolverError as error:
                raise SolverError(f"{self.label} {name}: {error}") from error
            stay[unit] = kept
        weights = {name: entry.weight for name, entry in corrections.items() if entry.weight is not None}
        report = KeptStructures(
            groups=tuple(stay["query"].tolist()),
            neurons=tuple(stay["neuron"].tolist()),
            errors={name: entry.error for name, entry in corrections.items() if entry.error is not None},
            retries=sum(entry.retries for entry in corrections.values()),
        )
        return Choice(stay, weights), report

    def cut(self, choice: "Choice") -> dict[str, Tensor]:
        """The parameters of the layer that change, by their names within it."""
        device = projection_weight(self.layer, self.kind.projections[0]).device
        kept = {unit: indices.to(device) for unit, indices in choice.kept.items()}
        kept["key"] = kept["query"]
        changed: dict[str, Tensor] = {}
        for name, unit in self.kind.structures.columns.items():
            if name in choice.corrected:
                changed[f"{name}.weight"] = choice.corrected[name]
            elif len(kept[unit]) < self._count_before(name, unit):
                columns = columns_of(kept[unit], self.heads.rows(unit))
                changed[f"{name}.weight"] = projection_weight(self.layer, name)[:, columns]
        for name, units in self.kind.structures.rows.items():
            rows = self._rows(name, units, kept)
            if len(rows) < len(projection_weight(self.layer, name)):
                for leaf, parameter in self.layer.get_submodule(name).named_parameters():
                    changed[f"{name}.{leaf}"] = parameter[rows]
        return changed

    def _choose(self, name: str, unit: Unit, sums: dict[str, WidthStatistics]) -> Tensor:
        """Indices of the structures that stay of those that own an output projection's columns."""
        weight, count = projection_weight(self.layer, name), self._count(unit)
        if count == self._count_before(name, unit):
            return torch.arange(count, device=weight.device)
        if self.scoring.score == "amp":
            activity = sums[name].activity
            return keep_largest(activity if unit == "neuron" else activity.view(-1, self.heads.queries).sum(1), count)
        if self.scoring.score == "obs":
            factor = factorise(sums[name].sums, DAMPING, sums[name].scale)  # given back at once: as large as the sums
            return keep_by_error(weight.float(), factor, self.heads.rows(unit), count)
        shares, means = self._outliers(name, unit, sums)
        return keep_largest(shares, count, ties=means).to(weight.device)

    def _outliers(self, name: str, unit: Unit, sums: dict[str, WidthStatistics]) -> tuple[Tensor, Tensor]:
        """The share of outliers among the weights that each structure owns, and the mean of their metric."""
        squares = {name: of.mean_squares for name, of in sums.items()}
        weights = {name: projection_weight(self.layer, name) for name in self.kind.projections}
        threshold = self.scoring.outlier_m * mean_metric((weights[name], squares[name]) for name in weights)
        count = self._count_before(name, unit)
        everything: dict[Unit, Tensor] = dict.fromkeys(("query", "key", "neuron"), torch.arange(count))
        owned = [Owned(weights[name], squares[name], everything[unit].repeat_interleave(self.heads.rows(unit)), 1)]
        kinds = ("neuron",) if unit == "neuron" else ("query", "key")
        for projection, units in self.kind.structures.rows.items():
            if units[0] in kinds:
                owners = torch.cat([everything[of].repeat_interleave(self.heads.rows(of)) for of in units])
                owned.append(Owned(weights[projection], squares[projection], owners, 0))
        return outlier_shares(owned, count, threshold)

    def _correct(self, name: str, kept: Tensor, statistics: InputStatistics) -> "Corrected":
        """Correct the columns of an output projection that stay, if they are to be, and measure the error."""
        weight = projection_weight(self.layer, name)
        columns = columns_of(kept, self.heads.rows(self.kind.structures.columns[name]))
        cut = weight[:, columns]
        corrected, retries, error = None, 0, None
        if self.scoring.correction:
            correction = correct(weight.float(), statistics, columns, DAMPING)
            cut = corrected = correction.weight.to(self.stored[name]).to(weight.dtype)
            retries = correction.retries
            if not bool(torch.isfinite(cut).all()):
                raise SolverError(overflow("corrected weight", self.stored[name]))
        if statistics.kind == "gram":
            whole = torch.zeros_like(weight, dtype=torch.float32)
            whole[:, columns] = cut.float()
            error = output_error(weight.float(), whole, statistics)
        return Corrected(corrected, error, retries)

    def _rows(self, name: str, units: Sequence[Unit], kept: dict[Unit, Tensor]) -> Tensor:
        """The rows of a projection that stay, part after part."""
        rows = len(projection_weight(self.layer, name))
        before = rows // sum(self.heads.rows(unit) for unit in units)
        parts, offset = [], 0
        for unit in units:
            size = self.heads.rows(unit)
            parts.append(offset + columns_of(kept[unit], size))
            offset += before * size
        return torch.cat(parts)

    def _count(self, unit: Unit) -> int:
        return self.widths.neurons if unit == "neuron" else self.widths.groups

    def _count_before(self, name: str, unit: Unit) -> int:
        return projection_weight(self.layer, name).shape[1] // self.heads.rows(unit)


def width_statistics(
    layer: nn.Module, of_layer: LayerKind, heads: Heads, scoring: Scoring, measure_error: bool
) -> dict[str, WidthStatistics]:
    """Return empty statistics of each input of a layer, by the first projection that reads it: what the score, the
    correction and the output errors need."""
    found = {}
    for name, *_ in of_layer.inputs:
        weight, unit = projection_weight(layer, name), of_layer.structures.columns.get(name)
        cols = weight.shape[1]
        shape = (cols, cols) if unit and scoring.needs_gram(measure_error) else (cols,)
        sums = torch.zeros(shape, dtype=torch.float32, device=weight.device)
        kind: Kind = "gram" if len(shape) == 2 else "squares"
        if unit and scoring.score == "amp":
            found[name] = WidthStatistics(kind, sums, weight=weight, size=heads.dim if unit == "query" else 1)
        else:
            found[name] = WidthStatistics(kind, sums)
    return found
