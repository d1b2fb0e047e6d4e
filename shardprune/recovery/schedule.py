"""The learning rate as a function of the step alone, so that a run resumes exactly."""

import math
from typing import Literal

Shape = Literal["cosine", "linear", "constant"]


def learning_rate(step: int, steps: int, highest: float, warmup: float, shape: Shape) -> float:
    """Return the learning rate of step `step` of `steps`, counted from 0.

    Linear warm-up over the first `warmup` (a fraction of the steps), then decay to zero in the given shape.
    """
    rising = round(warmup * steps)
    if step < rising:
        return highest * (step + 1) / rising
    done = (step - rising) / max(1, steps - rising)
    return highest * {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}[shape]
