import pytest
import torch

from shardprune.solvers.statistics import InputStatistics, output_error


def test_sums_over_waves_and_replicas_are_those_of_all_tokens(device):
    x = torch.randn(8, 20, 12, generator=torch.Generator().manual_seed(0))
    parts = []
    for share in (x[:5], x[5:]):
        part = InputStatistics.empty("gram", 12, device)
        for wave in share.to(device).split(2):
            part.add(wave, len(wave))
        parts.append(part)
    total, other = parts
    total.merge([None, other.part()])
    tokens = x.double().reshape(-1, 12)
    assert total.samples == 8
    assert torch.allclose(total.hessian.cpu().double(), 2 / 8 * tokens.T @ tokens, rtol=1e-5, atol=1e-5)
    assert torch.allclose(total.mean_squares.cpu().double(), (tokens**2).sum(0) / 8, rtol=1e-5)


def test_merged_sums_do_not_depend_on_who_merges(device):
    """To the bit: replicas are added in their order, wherever that happens."""
    x = 1e3 * torch.randn(3, 50, 12, generator=torch.Generator().manual_seed(0)).pow(3)
    merged = []
    for taker in range(3):
        replicas = [InputStatistics.empty("gram", 12, device) for _ in range(3)]
        for replica, share in zip(replicas, x, strict=True):
            replica.add(share.to(device), 1)
        replicas[taker].merge([None if place == taker else one.part() for place, one in enumerate(replicas)])
        merged.append(replicas[taker])
    assert torch.equal(merged[0].sums, merged[1].sums)
    assert torch.equal(merged[0].sums, merged[2].sums)
    assert [one.samples for one in merged] == [3, 3, 3]


def test_half_precision_inputs_are_summed_in_float32(device):
    x = (torch.randn(4, 500, 16, generator=torch.Generator().manual_seed(0)) + 3).bfloat16()
    statistics = InputStatistics.empty("gram", 16, device)
    statistics.add(x.to(device), len(x))
    tokens = x.double().reshape(-1, 16)
    assert statistics.sums.dtype == torch.float32
    assert torch.allclose(statistics.sums.cpu().double(), tokens.T @ tokens, rtol=1e-4)


@pytest.mark.parametrize("kind", ["gram", "squares"])
def test_mean_squares_are_the_same_for_both_kinds(kind):
    x = torch.randn(4, 10, 6, generator=torch.Generator().manual_seed(0))
    statistics = InputStatistics.empty(kind, 6)
    statistics.add(x, len(x))
    assert torch.allclose(statistics.mean_squares, x.square().sum((0, 1)) / 4, rtol=1e-5)


def test_output_error_is_that_of_the_outputs(device):
    generator = torch.Generator().manual_seed(0)
    x, dense = torch.randn(4, 30, 10, generator=generator), torch.randn(7, 10, generator=generator)
    pruned = dense * (torch.rand(7, 10, generator=generator) > 0.5)
    statistics = InputStatistics.empty("gram", 10, device)
    statistics.add(x.to(device), len(x))
    tokens = x.reshape(-1, 10)
    expected = float((tokens @ (dense - pruned).T).square().sum() / (tokens @ dense.T).square().sum())
    assert output_error(dense.to(device), pruned.to(device), statistics) == pytest.approx(expected, rel=1e-4)
