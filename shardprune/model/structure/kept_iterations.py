"""Which iterations of a path are kept as checkpoints."""

from dataclasses import dataclass


@dataclass(frozen=True)
class KeptIterations:
    """Iterations by number, or those that come nearest to shares of the parameters removed; one of the two is empty."""

    iterations: tuple[int, ...] = ()
    shares: tuple[float, ...] = ()

    def wants(self, iteration: int, below: float, above: float) -> bool:
        """Whether an iteration is kept.

        Args:
            below, above: the shares half way between this iteration and the ones before and after it.
        """
        return iteration in self.iterations or any(below < share <= above for share in self.shares)


def parse_keep(text: str) -> KeptIterations:
    """The iterations that a text such as `8,12` or `0.2,0.3` names.

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
