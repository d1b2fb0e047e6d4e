"""The file experts.json: statistics of the experts of a dense model, as a run leaves them and others take them.

What another share of experts, or another score, leaves of the model follows from them without a second pass.
"""

import hashlib
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

from pydantic import ConfigDict, Field

from shardprune.errors import InputError
from shardprune.model.expert_removal import Mixture
from shardprune.solvers.expert_scores import ROUTED, ExpertScore, ExpertStatistics, super_experts
from shardprune.storage.folder import Folder
from shardprune.storage.json_file import dump_json, fitting
from shardprune.storage.malformed import located
from shardprune.storage.output_names import EXPERTS
from shardprune.storage.sealed_json import sealed_fields, unsealed

Known = ConfigDict(extra="forbid")
Layer = Annotated[int, Field(ge=0)]


@dataclass(frozen=True)
class StatisticsFile:
    """The content of an experts.json.

    Attributes:
        model: identity of the dense model, by its config and a sample of every tensor.
        tokens_sha256: of the calibration windows, where there was a pass.
        propagated: what the layers saw in the pass: dense activations, or those behind layers that were cut.
        routed: sums over routed tokens, by layer, where there was a pass.
        ratios: mean |w| / rms(w) of each expert's weights, by layer, where they were looked at.
        distances: between the mean outputs of every two experts, by layer, where experts were merged.
    """

    __pydantic_config__: ClassVar[ConfigDict] = Known

    version: Literal[1]
    model: str
    tokens_sha256: str | None = None
    propagated: Literal["dense", "pruned"] = "dense"
    routed: dict[Layer, ExpertStatistics] = field(default_factory=dict)
    ratios: dict[Layer, tuple[float, ...]] = field(default_factory=dict)
    distances: dict[Layer, tuple[float, ...]] = field(default_factory=dict)

    def scores(self, score: ExpertScore) -> dict[int, list[float]]:
        """Return the scores of all experts by layer; the lowest go first."""
        if score in ROUTED:
            return {layer: list(ROUTED[score](own)) for layer, own in self.routed.items()}
        return {layer: [-ratio for ratio in own] for layer, own in self.ratios.items()}

    def has_scores(self, score: ExpertScore, layers: Collection[int]) -> bool:
        """Return whether there is what a score looks at, of all these layers."""
        return {*layers} <= (self.routed if score in ROUTED else self.ratios).keys()

    def has_distances(self, layers: Collection[int]) -> bool:
        """Return whether there are distances between the experts of all these layers."""
        return {*layers} <= self.distances.keys()

    def super_experts(self) -> dict[int, frozenset[int]]:
        """Return the experts with extreme outputs by layer; none are known without a pass."""
        return super_experts({layer: own.maxima for layer, own in self.routed.items()})

    def written(self) -> str:
        """Return the content as text."""
        return dump_json(sealed_fields(_plain(self))) + "\n"

    def digest(self) -> str:
        """Return a hash of the content."""
        return hashlib.sha256(self.written().encode()).hexdigest()


def _plain(statistics: StatisticsFile) -> dict[str, object]:
    names = ("version", "model", "tokens_sha256", "propagated")
    fields = {name: getattr(statistics, name) for name in names}
    routed = {str(layer): vars(own) for layer, own in sorted(statistics.routed.items())}
    by_layer = {
        name: {str(layer): own for layer, own in sorted(getattr(statistics, name).items())}
        for name in ("ratios", "distances")
    }
    return {**fields, "routed": routed, **by_layer}


def read_statistics(folder: Folder, model: str, mixture: Mixture) -> StatisticsFile:
    """Read the statistics that lie in an output.

    Args:
        model: identity of the dense model whose they must be.

    Raises:
        InputError: there are none, they are damaged, or another model's; names the folder's field.
    """
    place = f"{folder.url}/{EXPERTS}"
    if not folder.is_file(EXPERTS):
        raise InputError(folder.field, f"{folder.url} holds no {EXPERTS}; give the output of `shardprune experts`")
    with located(folder.field, place):
        found = fitting(unsealed(folder.read_json(EXPERTS)), StatisticsFile)
    if found.model != model:
        of = "of another model, or of this one read in another dtype (an FP8 checkpoint with another --dtype)"
        raise InputError(folder.field, f"{place} is {of}")
    for own in (found.routed, found.ratios, found.distances):
        if not own.keys() <= mixture.layers.keys():
            raise InputError(folder.field, f"{place} has other layers than the model")
    lists = [column for own in found.routed.values() for column in vars(own).values()]
    if any(len(column) != mixture.experts for column in (*lists, *found.ratios.values())):
        raise InputError(folder.field, f"{place} does not have the {mixture.experts} experts of every layer")
    pairs = mixture.experts * (mixture.experts - 1) // 2
    if any(len(own) != pairs or not min(own, default=0) >= 0 for own in found.distances.values()):
        raise InputError(folder.field, f"{place} has no distances between the {mixture.experts} experts of every layer")
    return found
