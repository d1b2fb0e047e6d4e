"""The steps that improve a layer beyond its pruning method, and the calibration windows held out to judge them. Read
without torch.

A step that is meant to improve a layer is kept only if the layer's output comes nearer to the dense one on windows that
it has not seen.
"""

from dataclasses import dataclass

LEAST_SAMPLES = 8  # calibration windows: half of them may be held out
LEAST_HELD_OUT, SHARE = 4, 10  # windows, and a tenth of all


@dataclass(frozen=True)
class Improving:
    """The steps that improve a layer: whether its projections aim at the dense residual stream (`stream_targets`), and
    by how many steps its kept weights are trained in the end (`reconstruction`). Where solutions are `measured`, which
    is no step of its own, held-out windows choose between those of each projection: its damping, and whether its kept
    weights are fitted."""

    stream_targets: bool = False
    reconstruction: int = 0
    measured: bool = False

    def __bool__(self) -> bool:
        return self.stream_targets or self.reconstruction > 0

    def held_out(self, samples: int) -> int:
        """Return how many of the calibration windows are held out: a tenth, at least four; none where nothing is to be
        judged."""
        return max(LEAST_HELD_OUT, -(-samples // SHARE)) if self or self.measured else 0


NOTHING = Improving()
