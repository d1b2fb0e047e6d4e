"""Mixtures of sources: how many windows or rows each gives, and in which order they stand."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction

from shardprune.errors import InputError
from shardprune.storage.locations import absolute
from shardprune.storage.sources import DATA_FORMS, FORMS, is_data, is_source

SELF = "self"  # the source that is what the model itself writes; followed by :OUT, what it has written for that run
BESIDE = "each with :WEIGHT beside others"
WEIGHTED = re.compile(r"(.+):(\d+(?:\.\d+)?|\.\d+)", re.DOTALL)


@dataclass(frozen=True)
class Kind:
    """The sources that a field of a recipe takes.

    Attributes:
        forms: of them, in words.
        known: whether a text, without a weight, has one of these forms.
    """

    field: str
    forms: str
    known: Callable[[str], bool]


def _is_calibration(source: str) -> bool:
    return is_source(source) or source == SELF or (source.startswith(f"{SELF}:") and len(source) > len(SELF) + 1)


CALIBRATION = Kind("calibration", f"{FORMS}, self or self:OUT, {BESIDE}", _is_calibration)
TRAINING = Kind("data", f"{DATA_FORMS} ({BESIDE})", is_data)


@dataclass(frozen=True)
class Part:
    """A source with its weight beside others."""

    source: str
    weight: Fraction = Fraction(1)

    @property
    def is_written(self) -> bool:
        """Whether the run's own model is to write the text."""
        return self.source == SELF

    @property
    def folder(self) -> str | None:
        """The output of the run whose model has written the text; None for any other source."""
        return self.source.removeprefix(f"{SELF}:") if self.source.startswith(f"{SELF}:") else None


def parse_parts(texts: Sequence[str], kind: Kind = CALIBRATION) -> tuple[Part, ...]:
    """Parse sources that may each be followed by :WEIGHT.

    A number at the end of what is a source without it is a weight.

    Raises:
        InputError: one has none of the known forms, weighs nothing, or is given twice.
    """
    if not texts:
        raise InputError(kind.field, f"is empty; use {kind.forms}")
    parts = tuple(_parse(text, kind) for text in texts)
    for place, part in enumerate(parts):
        if not part.weight:
            raise InputError(kind.field, f"{texts[place]!r} weighs nothing; use a weight above 0")
        if any(absolute(part.source) == absolute(other.source) for other in parts[:place]):
            raise InputError(kind.field, f"{part.source!r} is given twice; give each source once, with its weight")
    return parts


def windows_of(parts: Sequence[Part], samples: int) -> list[int]:
    """Return how many of the windows each part gives, by its weight.

    Raises:
        InputError: a part would give none.
    """
    counts = shares_of([part.weight for part in parts], samples)
    if none := [part.source for part, count in zip(parts, counts, strict=True) if not count]:
        raise InputError("samples", f"{samples} windows leave none for {none[0]!r} by the weights; use more of them")
    return counts


def shares_of(weights: Sequence[Fraction], items: int) -> list[int]:
    """Return how many of the items each weight gets: the largest remainders are rounded up, of equal ones the first."""
    total = sum(weights)
    exact = [items * weight / total for weight in weights]
    counts = [int(share) for share in exact]
    order = sorted(range(len(weights)), key=lambda place: (counts[place] - exact[place], place))
    for place in order[: items - sum(counts)]:
        counts[place] += 1
    return counts


def order_of(counts: Sequence[int]) -> list[tuple[int, int]]:
    """Return (part, window of the part) in the order in which the windows stand: those of every part are spread evenly,
    so that any run of windows is a mixture, too."""
    # Quotients of whole numbers are equal as floats if and only if they are equal, for as many windows as there can be.
    places = [
        ((2 * window + 1) / (2 * count), part, window) for part, count in enumerate(counts) for window in range(count)
    ]
    return [(part, window) for _, part, window in sorted(places)]


def held_out_last(counts: Sequence[int], held_out: int) -> list[int]:
    """Return an order of the windows in which those held out are the last: of every part its share, at equal distances
    among the part's, and where others have enough, not the only one."""
    places: list[list[int]] = [[] for _ in counts]
    for place, (part, _) in enumerate(order_of(counts)):
        places[part].append(place)
    shares = shares_of([Fraction(count) for count in counts], held_out)
    for part, count in enumerate(counts):
        largest = max(range(len(counts)), key=lambda other: counts[other] - shares[other])
        if shares[part] == count and counts[largest] - shares[largest] > 1:
            shares[part], shares[largest] = shares[part] - 1, shares[largest] + 1
    held = {
        of_part[(2 * window + 1) * len(of_part) // (2 * share)]
        for of_part, share in zip(places, shares, strict=True)
        for window in range(share)
    }
    return [*(place for place in range(sum(counts)) if place not in held), *sorted(held)]


def _parse(text: str, kind: Kind) -> Part:
    match = WEIGHTED.fullmatch(text)
    if match and kind.known(match[1]):
        return Part(match[1], Fraction(match[2]))
    if not kind.known(text):
        raise InputError(kind.field, f"{text!r} is no known source; use {kind.forms}")
    return Part(text)
