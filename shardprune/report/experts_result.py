"""The part of `result.json` about experts that were removed."""

from typing import Annotated

from pydantic import BaseModel, Field

from shardprune.storage.json_file import Measurement

Count = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(gt=0)]


class ExpertTraining(BaseModel):
    """A training of what a layer keeps (`router`, `reconstruction`), and ||output - dense output||^2 / ||dense output -
    dense input||^2 of the layer on held-out windows before and after it; it was kept where that fell."""

    step: str
    error_before: Measurement
    error_after: Measurement
    kept: bool


class ExpertsOfLayer(BaseModel):
    """The experts of a layer: which stayed, by their numbers in the dense model; which of these are super experts and
    were `protected`; the scores of all, and the calibration tokens that were routed to each, where there was a pass;
    the share of the routing weight that was `lost` with those that went; and what it was `trained` by. Where experts
    were merged nothing is lost: each of those that stayed is the average of its `members`, itself among them."""

    layer: Count
    kept: list[Count]
    members: list[list[Count]] | None = None
    protected: list[Count] = []
    scores: list[Measurement]
    tokens: list[Count] | None = None
    lost: float | None = None
    trained: list[ExpertTraining] = []


class Experts(BaseModel):
    """The removal of experts by a `score`: how many each layer had and has, how many a token gets, and the parameters
    that a token passes through before and after."""

    before: Positive
    after: Positive
    per_token: Positive
    score: str
    active_before: Positive
    active_after: Positive
    layers: list[ExpertsOfLayer]

    @property
    def merged(self) -> bool:
        """Whether experts were merged, and none went."""
        return any(layer.members for layer in self.layers)
