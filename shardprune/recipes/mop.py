"""The recipe of `shardprune mop`."""

from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from shardprune.errors import InputError
from shardprune.model.pruning_job import PathRemoval, PruningJob
from shardprune.model.structure.kept_iterations import parse_keep
from shardprune.recipes.groups import CalibrationFields, ModelOutputFields, PerplexityFields, WidthFields, WorkerFields
from shardprune.recipes.identity import shape_of
from shardprune.recipes.improving import TrainingFields, check_samples
from shardprune.recipes.recover import LORA_RATE
from shardprune.recipes.settings import Settings, optional
from shardprune.solvers.improving import Improving
from shardprune.solvers.scoring import Criterion, Score, Scoring
from shardprune.storage.sources import DATA_FORMS, is_data


class PathFields(Settings):
    """The path from the dense model to the small one."""

    title: ClassVar[str] = "Path"

    remove: float | None = Field(None, description="Fraction of parameters to remove; not needed with a path")
    path: str | None = Field(
        None, description="One letter per iteration: L removes a layer, G groups and neurons of every layer"
    )
    criterion: Literal["cosine", "kl", "perplexity", "random"] = Field(
        "perplexity", description="Choice between the two candidates of an iteration"
    )
    depth_rule: Literal["third-last", "cosine", "perplexity"] = Field(
        "third-last", description="Layer to remove: third from the end, smallest angle, or least perplexity loss"
    )
    mlp_only: bool = Field(False, description="Prune MLP neurons only")

    @field_validator("remove")
    @classmethod
    def _remove_in_range(cls, value: float | None) -> float | None:
        if value is not None and not 0 < value < 1:
            raise ValueError("use a number above 0 and below 1")
        return value

    @field_validator("path")
    @classmethod
    def _letters(cls, value: str | None) -> str | None:
        if value is not None and (not value or set(value) - {"L", "G"}):
            raise ValueError("use the letters L (a layer) and G (groups and neurons)")
        return value

    @model_validator(mode="after")
    def _path_fits(self) -> "PathFields":
        if self.remove is None and self.path is None:
            raise InputError("remove", "missing; give the share of parameters to remove, or a path")
        self.needs("a path that is searched for", self.path is None, "criterion")
        return self

    @property
    def scored_by(self) -> Criterion:
        """The criterion that scores candidates, whether or not the score decides."""
        return "perplexity" if self.criterion == "random" else self.criterion


class MopWidthFields(WidthFields):
    """Removal of width in an iteration of MoP."""

    score: Score = Field("amp", description=WidthFields.model_fields["score"].description)
    outlier_m: float = Field(
        5.0,
        gt=0,
        description="Outlier threshold M: a weight counts if its metric exceeds M x the mean",
    )


class TuneFields(Settings):
    """Fine-tuning of candidates before they are scored."""

    title: ClassVar[str] = "Tuned candidates"

    tune_candidates: int = Field(
        0, ge=0, description="Steps of LoRA fine-tuning of each candidate before it is scored; 0: none"
    )
    tune_data: str | None = Field(None, description=f"Data source: {DATA_FORMS}")
    tune_length: int = Field(512, ge=2, description="Maximum tokens per row")
    tune_batch: int = Field(16, ge=1, le=1_000_000, description="Global batch size, in rows")
    tune_learning_rate: float | None = optional(f"{LORA_RATE}", "Peak learning rate", gt=0)
    tune_zero: int = Field(2, ge=0, le=3, description="ZeRO stage, as of recover")

    @field_validator("tune_data")
    @classmethod
    def _tune_data_has_a_form(cls, value: str | None) -> str | None:
        if value is not None and not is_data(value):
            raise InputError("tune_data", f"{value!r} is no known source; use {DATA_FORMS}")
        return value

    @model_validator(mode="after")
    def _tuning_has_data(self) -> "TuneFields":
        self.needs("tune_candidates", self.tune_candidates > 0, *(set(TuneFields.model_fields) - {"tune_candidates"}))
        if self.tune_candidates and self.tune_data is None:
            raise InputError("tune_data", "missing; candidates are tuned on it")
        return self


class KeepFields(Settings):
    """Iterations to keep, and scores."""

    title: ClassVar[str] = "Kept iterations"

    keep: str | None = Field(
        None, description="Iterations to keep as checkpoints, by number (8,12) or fraction removed (0.2,0.3)"
    )
    scores: bool = Field(True, description="Score both candidates even if the path is given or random")

    @field_validator("keep", mode="before")
    @classmethod
    def _one_or_several(cls, value: Any) -> Any:
        return ",".join(map(str, value)) if isinstance(value, list | tuple) else value if value is None else str(value)

    @field_validator("keep")
    @classmethod
    def _keep_parses(cls, value: str | None) -> str | None:
        if value is not None:
            parse_keep(value)
        return value


class MopRecipe(
    PathFields,
    MopWidthFields,
    TuneFields,
    KeepFields,
    CalibrationFields,
    PerplexityFields,
    TrainingFields,
    WorkerFields,
    ModelOutputFields,
):
    """The recipe of `shardprune mop`."""

    command: ClassVar[str] = "mop"
    shaping: ClassVar[tuple[type[Settings], ...]] = (PathFields, MopWidthFields, TuneFields, TrainingFields)

    model: str = Field(min_length=1, description="Checkpoint: directory, URL or hub name")

    @model_validator(mode="after")
    def _options_have_an_effect(self) -> "MopRecipe":
        self.needs("score outlier", self.score == "outlier", "outlier_m")
        self.needs("a path that is given or random", self.path is not None or self.criterion == "random", "scores")
        if self.tune_candidates and self.scored_by != "perplexity":
            raise InputError("criterion", f"{self.criterion!r} does not go with tune_candidates; use perplexity")
        if self.tune_candidates and self.path is not None and not self.scores:
            raise InputError("tune_candidates", "has no effect without scores")
        if self.reconstruct:
            check_samples(self.samples, "reconstruct")
        return self

    def job(self) -> PruningJob:
        """Return the job of a run along a path."""
        return PruningJob(
            None,
            PathRemoval(self.scoring),
            None,
            measure_error=False,
            improving=Improving(reconstruction=self.reconstruct),
        )

    def shape(self) -> dict[str, Any]:
        """Return what shapes the tensors, beside model and text."""
        drawn = {"seed": self.seed} if self.criterion == "random" else {}  # which draws the path
        drawn |= {"seed": self.seed} if self.tune_candidates else {}  # and orders the rows
        return shape_of(self, "reconstruct", *TuneFields.model_fields) | drawn

    @property
    def scoring(self) -> Scoring:
        """The rule by which structures are chosen."""
        return Scoring(self.score, self.correction, self.outlier_m)
