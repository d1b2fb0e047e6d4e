"""Zeros stay zeros whatever the optimizer does; everything else moves."""

import pytest
import torch
from torch import nn

from shardprune.recovery.masks import freeze_zeros


@pytest.mark.parametrize("clip", [0.01, 1e9])
def test_zeros_stay_under_adamw_with_decay_and_clipping(clip):
    torch.manual_seed(0)
    linear = nn.Linear(12, 8)
    linear.weight.data[torch.rand(8, 12) < 0.5] = 0
    before = linear.weight.detach().clone()
    freeze_zeros(linear.weight)
    optimizer = torch.optim.AdamW(linear.parameters(), lr=0.1, weight_decay=0.5)
    for _ in range(30):
        optimizer.zero_grad()
        for _ in range(2):  # gradients that accumulate
            linear(torch.randn(16, 12)).square().sum().backward()
        torch.nn.utils.clip_grad_norm_(linear.parameters(), clip)
        optimizer.step()
    zeros = before == 0
    assert zeros.any()
    assert torch.equal(linear.weight == 0, zeros)
    assert (linear.weight != before)[~zeros].all()


def test_only_the_gradients_of_zeros_are_gone():
    torch.manual_seed(0)
    weight = nn.Parameter(torch.tensor([[0.0, 1.0], [-0.0, 1e-30]]))
    freeze_zeros(weight)
    (weight * torch.tensor([[5.0, 6.0], [7.0, 8.0]])).sum().backward()
    assert weight.grad.tolist() == [[0, 6], [0, 8]]
