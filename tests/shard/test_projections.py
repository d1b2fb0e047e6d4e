"""Output errors of projections as they are reported, against their definition by the outputs."""

import pytest
import torch

from shardprune.shard.projections import prune_projections
from shardprune.solvers.allocation.allocation import Share
from shardprune.solvers.methods import METHODS
from shardprune.solvers.pattern import parse_pattern
from shardprune.solvers.statistics import InputStatistics

NAMES = ("q", "k")


def plain_error(inputs, dense, pruned) -> float:
    """||X W^T - X W'^T||^2 / ||X W^T||^2."""
    before, after = inputs.double() @ dense.double().t(), inputs.double() @ pruned.double().t()
    return float((before - after).square().sum() / before.square().sum())


@pytest.mark.parametrize("method", ["sparsegpt", "magnitude"])
@pytest.mark.parametrize(
    ("stored", "sparsity", "distance"),
    [
        (torch.float32, 0.5, 1e-5),
        # Rounding to bfloat16 is reckoned as independent from weight to weight. At 2 % it is two fifths of the error.
        (torch.bfloat16, 0.5, 1e-3),
        (torch.bfloat16, 0.02, 5e-2),
    ],
)
def test_errors_are_those_of_the_weights_that_are_written(method, stored, sparsity, distance):
    generator = torch.Generator().manual_seed(0)
    mixing = torch.eye(192) + torch.randn(192, 192, generator=generator) / 14
    inputs = torch.randn(3, 200, 192, generator=generator) @ mixing
    statistics = InputStatistics.empty("gram", 192)
    statistics.add(inputs, 3)
    weights = {name: torch.randn(96, 192, generator=generator).to(stored).float() for name in NAMES}
    dense = {name: weight.clone() for name, weight in weights.items()}
    reports = prune_projections(
        METHODS[method],
        weights,
        dict.fromkeys(NAMES, stored),
        statistics,
        parse_pattern("unstructured"),
        dict.fromkeys(NAMES, Share(sparsity)),
        restore=False,
        measure_error=True,
        layer=0,
    )
    for report in reports:
        expected = plain_error(inputs.flatten(0, 1), dense[report.name], weights[report.name])
        assert report.error == pytest.approx(expected, rel=distance)
