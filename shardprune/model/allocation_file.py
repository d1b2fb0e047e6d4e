"""Allocation files: what every projection of a model gives up, as a run leaves it and another takes it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from pydantic import ConfigDict, Field

from shardprune.errors import InputError
from shardprune.model.pruning_job import Shapes
from shardprune.solvers.allocation.allocation import Sparsities
from shardprune.solvers.allocation.budget import TOLERANCE
from shardprune.storage.json_file import dump_json, parse_model
from shardprune.storage.malformed import located
from shardprune.storage.records import LayerRecord
from shardprune.storage.whole_files import read_file

FIELD = "allocation_file"  # of a recipe


@dataclass(frozen=True)
class AllocatedShare:
    """One projection, by its layer and its name, and the fraction of its weights that become zero."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    layer: Annotated[int, Field(ge=0)]
    name: str
    sparsity: Annotated[float, Field(ge=0, lt=1)]


@dataclass(frozen=True)
class AllocationFile:
    """The content of an allocation file."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    version: Literal[1]
    projections: tuple[AllocatedShare, ...]

    @classmethod
    def of(cls, records: Sequence[LayerRecord]) -> "AllocationFile":
        """Return what the projections of finished layers were asked to give up."""
        reports = [report for record in records for report in record.projections]
        return cls(1, tuple(AllocatedShare(report.layer, report.name, report.target) for report in reports))


def read_allocation(url: str, shapes: Shapes, target: float) -> Sparsities:
    """Read what every projection of a model gives up.

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
    found: Sparsities = {}
    for share in known.projections:
        place = share.layer, share.name
        if place not in sizes or place in found:
            problem = "names twice" if place in found else "names a projection that the model has not:"
            raise InputError(FIELD, f"{url!r} {problem} {_named(place)}")
        found[place] = share.sparsity
    if missing := [place for place in sizes if place not in found]:
        raise InputError(FIELD, f"{url!r} lacks {_named(missing[0])}; give that of a run on the same model")
    mean = sum(found[place] * size for place, size in sizes.items()) / sum(sizes.values())
    if abs(mean - target) > TOLERANCE:
        raise InputError(FIELD, f"{url!r} has a mean sparsity of {mean:.4f}, not of {target:g} as asked for")
    return found


def written(allocation: AllocationFile) -> str:
    """Return the content of an allocation file, a line for each projection."""
    lines = ",\n    ".join(dump_json(vars(share)) for share in allocation.projections)
    return f'{{\n  "version": {allocation.version},\n  "projections": [\n    {lines}\n  ]\n}}\n'


def _named(place: tuple[int, str]) -> str:
    return f"layer {place[0]} {dump_json(place[1])}"
