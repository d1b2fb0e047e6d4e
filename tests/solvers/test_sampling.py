"""Draws by seed, sequence and position, and the tokens that they make."""

import numpy as np
import pytest
import torch

from shardprune.solvers.sampling import drawn_tokens, draws


def test_a_draw_depends_on_seed_sequence_and_position_alone():
    whole = draws(3, range(10), 20)
    assert whole.shape == (10, 20)
    assert whole.dtype == torch.float64
    assert torch.equal(draws(3, range(4, 6), 20), whole[4:6])
    assert torch.equal(draws(3, range(10), 7), whole[:, :7])
    assert not torch.equal(draws(4, range(10), 20), whole)
    assert len(whole.unique()) == 200


def test_draws_are_those_of_numpy_by_the_same_key():
    generator = np.random.Generator(np.random.Philox(key=np.array([2**64 - 5, 7], dtype=np.uint64)))
    assert draws(-5, range(7, 8), 50)[0].tolist() == generator.random(50).tolist()


def test_tokens_are_found_by_inversion(device):
    logits = torch.randn(6, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3
    uniform = draws(0, range(6), 200)
    cumulative = (logits / 0.7).softmax(-1).cumsum(-1)
    for position in range(200):
        expected = [int((row <= at).sum()) for row, at in zip(cumulative, uniform[:, position], strict=True)]
        assert drawn_tokens(logits.to(device), 0.7, uniform[:, position]).tolist() == expected


@pytest.mark.parametrize("uniform", [0.0, 0.5, 1 - 2.0**-53])
def test_tokens_without_probability_are_never_drawn(device, uniform):
    logits = torch.full((1, 9), float("-inf"))
    logits[0, 4] = 0.0
    found = drawn_tokens(logits.to(device), 1.0, torch.tensor([uniform], dtype=torch.float64))
    assert found.tolist() == [4]


def test_tokens_are_drawn_as_often_as_is_likely():
    probabilities = torch.tensor([0.5, 0.3, 0.15, 0.05])
    uniform = draws(1, range(1), 20_000)[0]
    counts = drawn_tokens(probabilities.log().expand(20_000, 4), 1.0, uniform).bincount(minlength=4)
    assert torch.allclose(counts / 20_000, probabilities, atol=0.012)  # three standard deviations
