"""The recipe of `shardprune experts`."""

from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from shardprune.errors import InputError
from shardprune.model.pruning_job import ExpertRemoval, PruningJob
from shardprune.recipes.groups import (
    WORKERS,
    AskedLayout,
    CalibrationFields,
    ModelOutputFields,
    PerplexityFields,
    WorkerFields,
)
from shardprune.recipes.identity import shape_of
from shardprune.recipes.improving import TrainingFields, check_samples
from shardprune.recipes.settings import Settings, optional
from shardprune.solvers.expert_scores import ExpertScore, needs_pass
from shardprune.solvers.improving import Improving


class ExpertFields(Settings):
    """The experts that go."""

    title: ClassVar[str] = "Experts"

    remove: float | None = Field(None, description="Fraction of each layer's experts to remove; or give keep")
    keep: int | None = Field(None, ge=1, description="Number of experts that each layer keeps")
    score: ExpertScore = Field("reap", description="Importance of an expert; the least important go")
    multiple: int = Field(8, ge=1, description="With remove: round the experts that stay to a multiple")
    protect: bool = Field(
        True, description="Keep super experts, those with extreme outputs (not with aimer, nor with propagate pruned)"
    )
    merge: bool = Field(
        False, description="Merge experts whose outputs are alike, weighted by their tokens, instead of removing some"
    )
    propagate: Literal["dense", "pruned"] = Field(
        "dense",
        description="Activations that a layer sees in the pass: the dense model's, or behind layers as they are cut",
    )

    @field_validator("remove")
    @classmethod
    def _remove_in_range(cls, value: float | None) -> float | None:
        if value is not None and not 0 < value < 1:
            raise ValueError("use a number above 0 and below 1")
        return value

    @model_validator(mode="after")
    def _one_amount(self) -> "ExpertFields":
        if self.remove is None and self.keep is None:
            raise InputError("remove", "missing; give the share of experts to remove, or the number to keep")
        if self.remove is not None and self.keep is not None:
            raise InputError("keep", f"{self.keep} does not go with remove {self.remove:g}; give one of them")
        self.needs("remove", self.remove is not None, "multiple")
        if self.merge and not needs_pass(self.score):
            raise InputError("merge", f"does not go with score {self.score}, which looks at no tokens; use another one")
        return self


class ExpertTrainingFields(TrainingFields):
    """Training of what a layer keeps."""

    title: ClassVar[str] = "Improvement"

    router_kd: int = Field(
        0, ge=0, description="Steps of training each layer's router towards the dense layer's output; 0: none"
    )

    @property
    def improving(self) -> Improving:
        """The steps, as far as windows are held out for them."""
        return Improving(reconstruction=self.reconstruct + self.router_kd)


class GivenStatisticsFields(Settings):
    """Statistics that are there already."""

    title: ClassVar[str] = "Experts"

    statistics: str | None = optional(
        "none", "Output of another run on this model: its statistics are taken instead of a pass", min_length=1
    )


class ExpertWorkerFields(WorkerFields):
    """Shards and replicas of the pass over the dense model, and their weights."""

    shards: int | None = optional("1", "Number of contiguous runs of layers", ge=1)
    replicas: int | None = optional("GPUs / shards", "Workers per shard, sharing the samples", ge=1, le=WORKERS)
    weights: Literal["resident", "streamed"] = Field(
        "resident", description="resident keeps all layers in memory; streamed loads one at a time"
    )

    @property
    def asked(self) -> AskedLayout:
        return AskedLayout(self.shards, self.replicas, streamed=self.weights == "streamed")


class ExpertsRecipe(
    ExpertFields,
    GivenStatisticsFields,
    ExpertTrainingFields,
    CalibrationFields,
    PerplexityFields,
    ExpertWorkerFields,
    ModelOutputFields,
):
    """The recipe of `shardprune experts`."""

    command: ClassVar[str] = "experts"
    shaping: ClassVar[tuple[type[Settings], ...]] = (ExpertFields, GivenStatisticsFields, ExpertTrainingFields)

    model: str = Field(min_length=1, description="Checkpoint: directory, URL or hub name")

    @model_validator(mode="after")
    def _text_is_read(self) -> "ExpertsRecipe":
        reason = "a pass: statistics are given" if self.statistics else "a pass: aimer looks at the weights alone"
        self.needs(reason, self.observes, "propagate")
        self.needs(reason, self.reads_text, "calibration", "self_temperature", "self_bos", "self_batch")
        if self.improving:
            check_samples(self.samples, "router_kd" if self.router_kd else "reconstruct")
        return self

    @property
    def observes(self) -> bool:
        """Whether experts are looked at while calibration text passes through them."""
        return needs_pass(self.score) and self.statistics is None

    @property
    def reads_text(self) -> bool:
        """Whether calibration text is read: for a pass, or to train on."""
        return self.observes or bool(self.improving)

    def job(self) -> PruningJob:
        """Return the job of the run that removes experts."""
        removal = ExpertRemoval(self.score, self.remove, self.keep, self.multiple, self.protect, self.merge)
        return PruningJob(None, removal, None, measure_error=False, improving=self.improving)

    def shape(self) -> dict[str, Any]:
        """Return what shapes the tensors, beside model, text and given statistics."""
        shape = shape_of(self, "merge")
        del shape["statistics"]
        return shape
