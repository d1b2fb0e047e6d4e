"""Targets in the dense stream against the plain least-squares problems that they solve."""

import itertools

import pytest
import torch

from shardprune.solvers.improving import Improving
from shardprune.solvers.statistics import InputStatistics
from shardprune.solvers.stream_targets import RIDGE, Differences, aimed
from shardprune.storage.mixture import held_out_last, order_of


def nearest(dense, inputs, target, ridge):
    """The W* with the least ||X W*^T - target||^2 + ridge ||W* - W||^2, in double precision."""
    x, goal, weight = inputs.double(), target.double(), dense.double()
    hessian = x.t() @ x + ridge * torch.eye(x.shape[1], dtype=torch.float64)
    return (weight.t() + torch.linalg.solve(hessian, x.t() @ (goal - x @ weight.t()))).t()


@pytest.mark.parametrize("rows", [48, 160])
@pytest.mark.parametrize("of_inputs", [True, False])
def test_weights_come_as_near_to_the_target_as_least_squares_with_a_ridge(rows, of_inputs):
    generator = torch.Generator().manual_seed(rows)
    weight = torch.randn(rows, 131, generator=generator)
    dense_inputs = torch.randn(6, 50, 131, generator=generator)
    inputs = dense_inputs + torch.randn(6, 50, 131, generator=generator) / 3
    inputs[..., 7] = dense_inputs[..., 7] = 0  # never anything but zero
    stream = torch.randn(6, 50, rows, generator=generator)  # by which the residual stream differs before the projection
    missed = dense_inputs - inputs if of_inputs else stream + (dense_inputs - inputs) @ weight.t()
    statistics = InputStatistics.empty("gram", 131)
    differences = Differences.empty(131 if of_inputs else rows, 131)
    for start in (0, 4):  # two waves
        wave = slice(start, start + 4)
        statistics.add(inputs[wave], len(inputs[wave]))
        differences.add(missed[wave], inputs[wave], len(inputs[wave]))
    before = weight.clone()
    found = aimed(weight, statistics, differences, of_inputs, 0.5)

    flat, outputs = inputs.flatten(0, 1), (missed @ weight.t() if of_inputs else missed).flatten(0, 1)
    diagonal = flat.double().square().sum(0)
    diagonal[7] = 1 / statistics.scale  # a dead input counts as 1 in the Hessian, 2/N X^T X
    whole = nearest(weight, flat, flat @ weight.t() + outputs, RIDGE * float(diagonal.mean()))
    halfway = (weight.double() + whole) / 2
    assert torch.equal(weight, before)
    assert torch.equal(found[:, 7], weight[:, 7])
    assert torch.linalg.norm(found - halfway) < 1e-4 * torch.linalg.norm(halfway - weight)


def test_differences_of_replicas_add_up_in_their_order():
    generator = torch.Generator().manual_seed(0)
    parts = [Differences.empty(3, 5) for _ in range(3)]
    plain = torch.zeros(3, 5)
    for part in parts:
        e, x = torch.randn(2, 4, 3, generator=generator), torch.randn(2, 4, 5, generator=generator)
        part.add(e, x, 2)
        plain += e.flatten(0, 1).t() @ x.flatten(0, 1)
    merged = [
        Differences(part.sums.clone(), part.samples) for part in parts
    ]  # each in turn is the one that takes the others' sums
    for place, taker in enumerate(merged):
        taker.merge([None if other == place else part.part() for other, part in enumerate(parts)])
        assert taker.samples == 6
        assert torch.equal(taker.sums, merged[0].sums)
    assert torch.allclose(merged[0].sums, plain, atol=1e-5)


@pytest.mark.parametrize(("samples", "held_out"), [(8, 4), (40, 4), (41, 5), (128, 13), (1000, 100)])
def test_a_tenth_of_the_windows_at_equal_distances_is_held_out(samples, held_out):
    assert Improving(stream_targets=True).held_out(samples) == held_out
    assert Improving().held_out(samples) == 0
    order = held_out_last([samples], held_out)
    assert sorted(order) == list(range(samples))
    calibrating, held = order[:-held_out], order[-held_out:]
    assert calibrating == sorted(calibrating)
    distances = {after - before for before, after in itertools.pairwise(held)}
    assert max(distances) - min(distances) <= 1
    assert abs(held[0] - (samples - 1 - held[-1])) <= 1


@pytest.mark.parametrize(
    ("counts", "held_out", "shares"),
    [
        ((4, 4), 4, [2, 2]),
        ((16, 16), 4, [2, 2]),
        ((4, 12), 4, [1, 3]),
        ((40, 40, 40), 12, [4, 4, 4]),
        ((25, 75), 10, [3, 7]),
        ((1, 7), 4, [0, 4]),
        ((1, 1, 6), 4, [0, 0, 4]),
        ((1,) * 8, 4, [1, 1, 1, 1, 0, 0, 0, 0]),
    ],
)
def test_every_part_of_a_mixture_has_its_share_of_the_windows_held_out(counts, held_out, shares):
    order = held_out_last(counts, held_out)
    assert sorted(order) == list(range(sum(counts)))
    parts = [part for part, _ in order_of(counts)]
    held = [parts[place] for place in order[-held_out:]]
    assert [held.count(part) for part in range(len(counts))] == shares
