"""The course of a reconstruction: how long it warms up and cools down, how fast every projection learns, and which
windows a step sees. Read without torch."""

import math
import random
from collections.abc import Iterator

RATE = 3e-2  # of the learning, as a fraction of the root mean square of a projection's kept weights
BETAS = 0.9, 0.95
WARM_UP = 0.1  # of the steps
STEP_TOKENS = 2048  # in whole windows


def rate_at(step: int, steps: int) -> float:
    """Return the share of the full rate at a step: it rises in a straight line, then falls as a cosine to nothing."""
    rising = max(1, int(WARM_UP * steps))
    if step < rising:
        return (step + 1) / rising
    return 0.5 * (1 + math.cos(math.pi * (step - rising) / (steps - rising)))


def windows_of_steps(windows: int, seqlen: int, steps: int, seed: int) -> Iterator[list[int]]:
    """Yield the windows of each step: in an order drawn anew whenever fewer are left than a step takes."""
    drawing = random.Random(seed)
    size = min(windows, max(1, STEP_TOKENS // seqlen))
    left: list[int] = []
    for _ in range(steps):
        if len(left) < size:
            left = drawing.sample(range(windows), windows)
        yield [left.pop() for _ in range(size)]
