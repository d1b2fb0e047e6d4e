"""Sparsity and structure of a whole model, from the records of its finished layers."""

from collections.abc import Sequence
from dataclasses import asdict

from transformers import PretrainedConfig

from shardprune.model.structure.shape import Widths, reshaped, widths_of
from shardprune.report.result import (
    BlockResult,
    ImprovementResult,
    LayerResult,
    ModelSize,
    NarrowedLayer,
    ProjectionResult,
    Shape,
    Sparsity,
    Structure,
)
from shardprune.storage.records import LayerRecord, ProjectionReport


def zeros_of(records: Sequence[LayerRecord]) -> int:
    """Return the zeros of all projections of the layers."""
    return sum(record.zeros for record in records)


def sparsity_of(records: Sequence[LayerRecord], target: float | None, original: int | None = None) -> Sparsity:
    """Return the sparsity of a model from the records of its finished layers.

    Args:
        target: what was asked for; None where that is what a sparse checkpoint had.
        original: the weights of the model from which structures had been removed, if any had.
    """

    def asked(reports: Sequence[ProjectionReport]) -> float:
        """The mean target over all weights."""
        return sum(report.target * report.weights for report in reports) / sum(report.weights for report in reports)

    reports = [report for record in records for report in record.projections]
    weights = sum(report.weights for report in reports)
    achieved = sum(report.zeros for report in reports) / weights
    allocated = asked(reports)
    layers = [
        LayerResult(
            layer=record.layer, target=asked(record.projections), achieved=_fraction(record), outliers=record.outliers
        )
        for record in records
        if record.projections
    ]
    remaining = 1.0 if original is None else weights / original
    removed = 1 - remaining
    return Sparsity(
        target=allocated if target is None else target,
        allocated=removed + remaining * allocated,
        before=sum(report.zeros_before for report in reports) / weights,
        achieved=removed + remaining * achieved,
        removed=None if original is None else removed,
        zeroed=None if original is None else remaining * achieved,
        layers=layers,
        projections=[ProjectionResult.of(report) for report in reports],
        blocks=[BlockResult(**asdict(block)) for record in records for block in record.blocks] or None,
        improvements=improvements_of(records),
    )


def improvements_of(records: Sequence[LayerRecord]) -> list[ImprovementResult] | None:
    """Return the steps that were meant to improve layers; None where there were none."""
    return [ImprovementResult(**asdict(step)) for record in records for step in record.improvements] or None


def _fraction(record: LayerRecord) -> float:
    assert record.sparsity is not None, f"layer {record.layer} has no projections"
    return record.sparsity


def removal_of(records: Sequence[LayerRecord], target: float | None) -> Sparsity:
    """Return the sparsity of a model that only lost structures, from the records of its finished layers.

    Args:
        target: the fraction that was to be removed.
    """
    assert target is not None
    sizes = [record.sizes for record in records if record.sizes is not None]
    assert len(sizes) == len(records), "a layer has lost no structures"
    before = sum(size.weights_before for size in sizes)
    zeros = sum(size.zeros for size in sizes) / before
    removed = 1 - sum(size.weights for size in sizes) / before
    return Sparsity(
        target=target,
        allocated=target,
        before=sum(size.zeros_before for size in sizes) / before,
        achieved=removed + zeros,
        removed=removed,
        zeroed=zeros,
        layers=[],
        projections=[],
        improvements=improvements_of(records),
    )


def structure_of(
    config: PretrainedConfig, widths: Widths, size: ModelSize, records: Sequence[LayerRecord]
) -> Structure:
    """Return what a run removed that made the layers of a model narrower."""
    layers = [
        NarrowedLayer(
            layer=record.layer,
            groups=list(record.kept.groups),
            errors=record.kept.errors,
            retries=record.kept.retries,
        )
        for record in records
        if record.kept is not None
    ]
    return Structure(
        before=shape_of(config), after=shape_of(reshaped(config, widths)), removed=size.removed, layers=layers
    )


def shape_of(config: PretrainedConfig) -> Shape:
    """Return the shape of a model with this config."""
    widths = widths_of(config)
    heads = config.num_attention_heads
    return Shape(layers=config.num_hidden_layers, groups=widths.groups, heads=heads, neurons=widths.neurons)
