"""The learning rate over a training, as a function of the step alone, so that a training resumes exactly."""

import math
from typing import Literal

Shape = Literal["cosine", "linear", "constant"]


def learning_rate(step: int, steps: int, highest: float, warmup: float, shape: Shape) -> float:
    """The rate of step `step` of `steps`, counted from 0.

    It rises linearly over the first `warmup` (a fraction of the steps), then falls to zero as the shape says.
    """
    rising = round(warmup * steps)
    if step < rising:
        return highest * (step + 1) / rising
    done = (step - rising) / max(1, steps - rising)
    return highest * {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}[shape]
