"""Sampling of tokens, so that a draw depends on the seed, the sequence and the position alone.

Draws come from a counter-based generator (Philox, keyed by seed and sequence), not from a stream that sequences share:
whoever draws for whichever sequences gets the same numbers. A token is found by inversion of the cumulative
distribution in whole numbers, whose sums do not depend on their order.
"""

import numpy as np
import torch
from torch import Tensor

UNIT = 2**40  # a probability of 1 as a whole number: a float32 has 24 bits, and 2**22 tokens still fit into 64


def draws(seed: int, sequences: range, positions: int) -> Tensor:
    """Return uniform numbers from [0, 1), float64 [sequences, positions], multiples of 2**-53.

    Args:
        seed: any whole number of 64 bits.
        sequences: numbers of the sequences, each of which has numbers of its own.
    """
    keys = [np.array([seed % 2**64, sequence], dtype=np.uint64) for sequence in sequences]
    raw = np.stack([np.random.Philox(key=key).random_raw(positions) for key in keys])
    return torch.from_numpy((raw >> np.uint64(11)).astype(np.float64) * 2.0**-53)


def drawn_tokens(logits: Tensor, temperature: float, uniform: Tensor) -> Tensor:
    """Return one token for each row of logits [rows, vocabulary], int64 [rows] on the CPU.

    Args:
        temperature: logits are divided by it.
        uniform: one number from [0, 1) for each row, float64 [rows].
    """
    probabilities = (logits.float() / temperature).softmax(-1)
    cumulative = (probabilities.double() * UNIT).long().cumsum(-1)
    thresholds = (uniform.to(cumulative.device) * cumulative[:, -1]).long()  # below the total: rounding goes down
    return torch.searchsorted(cumulative, thresholds.unsqueeze(1), right=True).squeeze(1).cpu()
