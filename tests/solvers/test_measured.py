"""Damping that held-out windows choose, and refits that they judge."""

from dataclasses import replace

import pytest
import torch

from shardprune.errors import SolverError
from shardprune.solvers.least_squares import fitting
from shardprune.solvers.measured import choose
from shardprune.solvers.methods import DAMPINGS, METHODS, Slack, Target
from shardprune.solvers.pattern import parse_pattern
from shardprune.solvers.statistics import InputStatistics
from tests.solvers.test_sparsegpt import gathered, inputs


def judged(tokens: int, cols: int, device: str = "cpu") -> tuple[InputStatistics, torch.Tensor]:
    """Statistics of so many tokens with those of held-out ones, and the held-out inputs."""
    drawn = inputs(4, 2 * tokens, cols, seed=1)
    statistics, held = gathered(drawn[:, :tokens].contiguous(), device), drawn[:, tokens:].reshape(-1, cols)
    statistics.held_out = InputStatistics.empty("gram", cols, device)
    statistics.held_out.add(held.to(device), 4)
    return statistics, held


def lost(solve, target: Target, statistics: InputStatistics, held: torch.Tensor, **fields) -> float:
    """What a projection loses on the held-out inputs, by a plain product."""
    (solution,) = solve([replace(target, **fields)], statistics)
    change = (target.weight - solution.weight).cpu().double()
    return float((held.double() @ change.T).square().sum())


@pytest.mark.parametrize("refitted", [False, True])
@pytest.mark.parametrize("method", ["sparsegpt", "alps"])
def test_each_projection_gets_the_largest_value_that_is_as_good_on_the_held_out_inputs(method, refitted, device):
    statistics, held = judged(40, 96, device)
    generator = torch.Generator().manual_seed(0)
    targets = [
        Target(torch.randn(rows, 96, generator=generator).to(device), parse_pattern(pattern), 0.6, refit=refitted)
        for rows, pattern in [(24, "unstructured"), (8, "2:4"), (300, "unstructured")]
    ]
    solve = fitting(METHODS[method].solve)
    anywhere, in_groups = {"sparsegpt": (0.03, 0.01), "alps": (0.0, 0.0)}[method]
    assert METHODS[method].slack == Slack(anywhere, in_groups)
    chosen = choose(METHODS[method], targets, statistics, DAMPINGS)
    assert not statistics._factors
    for target, found in zip(targets, chosen, strict=True):
        plain, fitted = (
            {damping: lost(solve, target, statistics, held, damping=damping, refit=fit) for damping in DAMPINGS}
            for fit in (False, refitted)
        )
        slack = in_groups if target.pattern.sparsity else anywhere
        best = max(damping for damping in DAMPINGS if plain[damping] <= (1 + slack) * min(plain.values()))
        fits = refitted and min(fitted.values()) < plain[best]
        assert (found.damping, found.refit) == (min(fitted, key=fitted.get), True) if fits else (best, False)
        assert (found.weight is target.weight, found.pattern, found.sparsity) == (True, target.pattern, 0.6)


def test_a_refit_that_loses_on_the_held_out_inputs_is_undone_and_no_other():
    """Few tokens are fitted too closely, and many are not."""
    weight = torch.randn(64, 96, generator=torch.Generator().manual_seed(0))
    target = Target(weight, parse_pattern("unstructured"), 0.6, 0.0001, refit=True)
    for tokens, fits in ((12, False), (2000, True)):
        statistics, held = judged(tokens, 96)
        (chosen,) = choose(METHODS["wanda"], [target], statistics, (0.0001,))
        solve = fitting(METHODS["wanda"].solve)
        plain, fitted = (lost(solve, target, statistics, held, refit=fit) for fit in (False, True))
        assert chosen.refit == (fitted < plain) == fits


def test_few_tokens_want_more_damping_than_many():
    weight = torch.randn(64, 96, generator=torch.Generator().manual_seed(0))
    target = Target(weight, parse_pattern("unstructured"), 0.7)
    few, many = (choose(METHODS["alps"], [target], judged(tokens, 96)[0], DAMPINGS) for tokens in (12, 2000))
    assert few[0].damping > many[0].damping


def test_a_projection_that_no_value_solves_is_an_error():
    statistics, _ = judged(40, 16)
    target = Target(torch.full((4, 16), 3e38), parse_pattern("unstructured"), 0.5)
    with pytest.raises(SolverError, match="the pruned weight is not finite"):
        choose(METHODS["sparsegpt"], [target], statistics, DAMPINGS)


@pytest.mark.parametrize("kind", ["gram", "squares"])
def test_held_out_sums_go_where_the_statistics_go(kind):
    parts, whole = [], []
    for replica in range(3):
        statistics = InputStatistics.empty(kind, 70)
        statistics.held_out = InputStatistics.empty("gram", 70)
        drawn = inputs(2, 20, 70, seed=replica)
        statistics.add(drawn[:1], 1)
        statistics.held_out.add(drawn[1:], 1)
        whole.append(drawn[1].double())
        parts.append(statistics)
    taker, others = parts[1], [parts[0].part(), None, parts[2].part()]
    taker.merge(others)
    tokens = torch.cat(whole)
    assert taker.samples == 3
    assert torch.allclose(taker.held_out.gram, (tokens.T @ tokens).float(), rtol=1e-4, atol=1e-3)
