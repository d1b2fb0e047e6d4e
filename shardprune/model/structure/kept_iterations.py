"""The iterations of a path that are kept as checkpoints."""

from dataclasses import dataclass


@dataclass(frozen=True)
class KeptIterations:
    """Kept iterations, by number or by the nearest share of parameters removed; one of the two is empty."""

    iterations: tuple[int, ...] = ()
    shares: tuple[float, ...] = ()

    def keeps(self, iteration: int, below: float, above: float) -> bool:
        """Return whether an iteration is kept.

        Args:
            below, above: midpoints between this iteration's removed share and those of the iterations before and after
                it.
        """
        return iteration in self.iterations or any(below < share <= above for share in self.shares)


def parse_keep(text: str) -> KeptIterations:
    """Parse a list of iterations such as `8,12`, or of shares such as `0.2,0.3`.

    Raises:
        ValueError: it is neither.
    """
    parts = [part.strip() for part in text.split(",")]
    try:
        if all(part.isdecimal() for part in parts) and all(int(part) for part in parts):
            return KeptIterations(iterations=tuple(int(part) for part in parts))
        shares = tuple(float(part) for part in parts)
    except ValueError:
        shares = (0.0,)
    if not all(0 < share < 1 for share in shares):
        raise ValueError("use numbers of iterations such as 8,12, or shares above 0 and below 1 such as 0.2,0.3")
    return KeptIterations(shares=shares)
