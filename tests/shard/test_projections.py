"""Output errors of projections as they are reported, against their definition by the outputs."""

import pytest
import torch

from shardprune.errors import SolverError
from shardprune.shard.projections import adopt_projection, prune_projections
from shardprune.solvers.allocation.allocation import Share
from shardprune.solvers.methods import METHODS
from shardprune.solvers.pattern import Unstructured, parse_pattern
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


def test_a_weight_that_overflows_when_it_is_stored_is_named():
    """The solver moves what it prunes into the remaining weights, which are near float16's largest."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(3, 200, 1, generator=generator) + torch.randn(3, 200, 32, generator=generator) / 10
    statistics = InputStatistics.empty("gram", 32)
    statistics.add(inputs, 3)
    weights = {name: 6e4 - torch.rand(8, 32, generator=generator) * 1e4 for name in NAMES}
    with pytest.raises(SolverError, match=r"^layer 3 q: the pruned weight overflows float16, .*\(up to 65504\)"):
        prune_projections(
            METHODS["sparsegpt"],
            weights,
            dict.fromkeys(NAMES, torch.float16),
            statistics,
            parse_pattern("unstructured"),
            dict.fromkeys(NAMES, Share(0.5)),
            restore=False,
            measure_error=False,
            layer=3,
        )


def test_a_sparse_weight_that_the_dense_dtype_cannot_hold_is_named():
    given = torch.tensor([[7e4, 0.0], [0.0, 1.0]])
    with pytest.raises(SolverError, match=r"^layer 1 q: the sparse weight overflows float16"):
        adopt_projection(torch.ones(2, 2), given, torch.float16, Unstructured(), False, 1, "q")
    adopted, _ = adopt_projection(torch.ones(2, 2), given, torch.float16, Unstructured(), True, 1, "q")
    assert torch.equal(adopted, torch.eye(2).half())
