"""Allocation files: what every projection of a model gives up, as a run leaves it and another takes it; and the curves
of the errors that it would add, which are shared out for any other sparsity that is asked for.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from pydantic import ConfigDict, Field

from shardprune.errors import InputError
from shardprune.model.pruning_job import Shapes
from shardprune.solvers.allocation.allocation import Sparsities
from shardprune.solvers.allocation.budget import HIGHEST, TOLERANCE
from shardprune.solvers.allocation.knapsack import share_out
from shardprune.storage.json_file import dump_json, parse_model
from shardprune.storage.malformed import located
from shardprune.storage.records import LayerRecord
from shardprune.storage.whole_files import read_file

FIELD = "allocation_file"  # of a recipe

Fraction = Annotated[float, Field(ge=0, lt=1)]


@dataclass(frozen=True)
class AllocatedShare:
    """One projection, by its layer and its name: the fraction of its weights that become zero, a `curve` of levels of
    sparsity, ascending, each with the error that is added there, or both."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    layer: Annotated[int, Field(ge=0)]
    name: str
    sparsity: Fraction | None = None
    curve: tuple[tuple[Fraction, Annotated[float, Field(ge=0)]], ...] | None = None


@dataclass(frozen=True)
class LayerShare:
    """One layer: the fraction of the weights that become zero of each of its projections that has no share by name."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    layer: Annotated[int, Field(ge=0)]
    sparsity: Fraction


@dataclass(frozen=True)
class AllocationFile:
    """The content of an allocation file. Where it does not have all projections, the `others` share what is left of the
    target equally."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    version: Literal[1]
    projections: tuple[AllocatedShare, ...] = ()
    layers: tuple[LayerShare, ...] = ()
    others: Literal["equal"] | None = None

    @classmethod
    def of(cls, records: Sequence[LayerRecord], curves: Sequence[AllocatedShare] = ()) -> "AllocationFile":
        """Return what the projections of finished layers were asked to give up, with the curves that said so, where any
        did."""
        reports = [report for record in records for report in record.projections]
        known = {(share.layer, share.name): share.curve for share in curves}
        return cls(
            1,
            tuple(
                AllocatedShare(report.layer, report.name, report.target, known.get((report.layer, report.name)))
                for report in reports
            ),
        )


def read_allocation(url: str, shapes: Shapes, target: float) -> Sparsities:
    """Read what every projection of a model gives up.

    Where the file has curves, they are shared out, unless it says what came of that for the same target.

    Args:
        shapes: [rows, cols] of the model's projections, by layer and name.
        target: fraction of all their weights that is to become zero.

    Raises:
        InputError: the file cannot be read or is none, it is another model's, or its mean is not the target.
    """
    content = read_file(url, FIELD)
    with located(FIELD, url):
        known = parse_model(content, AllocationFile)
    sizes = {(layer, name): rows * cols for layer, of in enumerate(shapes) for name, (rows, cols) in of.items()}
    shares: dict[tuple[int, str], AllocatedShare] = {}
    for share in (*known.projections, *_completing(url, known, sizes, target)):
        place = share.layer, share.name
        if place not in sizes or place in shares:
            problem = "names twice" if place in shares else "names a projection that the model has not:"
            raise InputError(FIELD, f"{url!r} {problem} {_named(place)}")
        shares[place] = share
    if missing := [place for place in sizes if place not in shares]:
        raise InputError(FIELD, f"{url!r} lacks {_named(missing[0])}; give that of a run on the same model")
    curves = {place: share.curve for place, share in shares.items() if share.curve is not None}
    found: Sparsities = {place: share.sparsity for place, share in shares.items() if share.sparsity is not None}
    if curves:
        _check_curves(url, shares)
    elif missing := [place for place in shares if place not in found]:
        raise InputError(FIELD, f"{url!r} has neither a sparsity nor a curve of {_named(missing[0])}")
    mean = sum(found.get(place, math.inf) * size for place, size in sizes.items()) / sum(sizes.values())
    if abs(mean - target) > TOLERANCE:
        if curves:
            try:
                return share_out(curves, sizes, target)
            except ValueError as error:
                raise InputError(FIELD, f"{url!r} has {error}") from error
        raise InputError(FIELD, f"{url!r} has a mean sparsity of {mean:.4f}, not of {target:g} as asked for")
    return found


def _completing(
    url: str, known: AllocationFile, sizes: Mapping[tuple[int, str], int], target: float
) -> list[AllocatedShare]:
    """Return the shares of the projections that a file does not have by name: their layer's, or what is left of the
    target for all others together.

    Raises:
        InputError: a layer has no projections or is there twice, or the others cannot have what is left.
    """
    found = {(share.layer, share.name): share.sparsity for share in known.projections}
    if (known.layers or known.others) and any(share.curve for share in known.projections):
        raise InputError(FIELD, f"{url!r} has curves, which do not go with layers or others")
    of_layers: dict[int, float] = {}
    for one in known.layers:
        if one.layer in of_layers or one.layer not in {layer for layer, _ in sizes}:
            problem = "twice" if one.layer in of_layers else "of which no projection is pruned"
            raise InputError(FIELD, f"{url!r} has a layer {problem}: {one.layer}")
        of_layers[one.layer] = one.sparsity
    made = [
        AllocatedShare(*place, of_layers[place[0]]) for place in sizes if place[0] in of_layers and place not in found
    ]
    if not known.others:
        return made
    found |= {(share.layer, share.name): share.sparsity for share in made}
    rest = [place for place in sizes if place not in found]
    given = sum((share or 0.0) * sizes.get(place, 0) for place, share in found.items())
    if not rest:
        return made
    left = (target * sum(sizes.values()) - given) / sum(sizes[place] for place in rest)
    if not 0 <= left <= HIGHEST:
        raise InputError(
            FIELD, f"{url!r} leaves the others a sparsity of {left:.4f} for {target:g} in all; use 0 to {HIGHEST}"
        )
    return [*made, *(AllocatedShare(*place, left) for place in rest)]


def _check_curves(url: str, shares: Mapping[tuple[int, str], AllocatedShare]) -> None:
    """Check that projections have curves at the same levels, in ascending order, and sparsities beside all or none."""
    expected = next([level for level, _ in share.curve] for share in shares.values() if share.curve is not None)
    alone = next(share.sparsity is None for share in shares.values() if share.curve is not None)
    for place, share in shares.items():
        levels = [level for level, _ in share.curve or ()]
        beside = (share.sparsity is None) != alone
        if beside or levels != expected or len(levels) < 2 or sorted(set(levels)) != levels:
            raise InputError(
                FIELD,
                f"{url!r} has no fitting curve of {_named(place)}; use one of at least two levels in ascending order, "
                "the same for every projection, with a sparsity beside all or none",
            )


def written(allocation: AllocationFile) -> str:
    """Return the content of an allocation file, a line for each projection."""
    known = (
        {name: value for name, value in vars(share).items() if value is not None} for share in allocation.projections
    )
    lines = ",\n    ".join(map(dump_json, known))
    return f'{{\n  "version": {allocation.version},\n  "projections": [\n    {lines}\n  ]\n}}\n'


def _named(place: tuple[int, str]) -> str:
    return f"layer {place[0]} {dump_json(place[1])}"
