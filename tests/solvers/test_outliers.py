import pytest
import torch

from shardprune.solvers import outliers
from shardprune.solvers.outliers import outlier_ratios


@pytest.mark.parametrize("block", [1, 100, 2**24])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("m", [2.0, 5.0])
def test_ratios_are_those_of_the_concatenated_metric(m, dtype, block, device, monkeypatch):
    monkeypatch.setattr(outliers, "BLOCK", block)
    generator = torch.Generator().manual_seed(0)
    shapes = {"q": (40, 32), "k": (8, 32), "down": (32, 56)}
    weights = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}
    squares = {name: torch.randn(shape[1], generator=generator).exp() ** 2 for name, shape in shapes.items()}
    squares["down"][3] = 0

    metric = {name: weights[name].double().abs() * squares[name].double().sqrt() for name in shapes}
    everything = torch.cat([entries.flatten() for entries in metric.values()])
    of_layer = 100 * float((everything > m * everything.mean()).double().mean())
    own = {name: 100 * float((entries > m * entries.mean()).double().mean()) for name, entries in metric.items()}

    found = outlier_ratios({name: (weights[name].to(device), squares[name].to(device)) for name in shapes}, m)
    assert found.layer == pytest.approx(of_layer, abs=1e-9)
    assert found.projections == pytest.approx(own, abs=1e-9)
    assert found.layer != pytest.approx(sum(own.values()) / 3)  # the layer has a mean of its own
    assert found.layer > 0


def test_inputs_that_are_always_zero_have_no_outliers():
    assert outlier_ratios({"q": (torch.ones(4, 8), torch.zeros(8))}, 5.0).projections == {"q": 0.0}
