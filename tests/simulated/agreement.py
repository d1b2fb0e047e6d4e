"""Agreement of checkpoints that two devices have written."""

import torch

from tests.support.tiny import load_tensors


def check_same(one, other, tolerance: float) -> None:
    """Check that two checkpoints have the same zeros and the same values, to the bit where the tolerance is 0."""
    first, second = load_tensors(one), load_tensors(other)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        expected = second[name]
        assert torch.equal(tensor == 0, expected == 0), f"{name}: other zeros"
        assert torch.allclose(tensor, expected, rtol=0, atol=tolerance * float(expected.abs().max())), name
