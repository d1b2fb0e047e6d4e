"""The recipes of `shardprune prune` and `shardprune rebuild`."""

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from shardprune.errors import InputError
from shardprune.model.pruning_job import Adopted, PruningJob, WidthRemoval, Zeroing
from shardprune.recipes.groups import (
    CalibrationFields,
    EvaluationFields,
    ExpertFields,
    Globs,
    ModelOutputFields,
    PruneWorkerFields,
    WidthFields,
)
from shardprune.recipes.identity import shape_of, shaping_fields
from shardprune.recipes.improving import ImprovingFields, TrainingFields
from shardprune.recipes.quality import QualityFields
from shardprune.recipes.settings import Settings, optional
from shardprune.solvers.allocation.allocations import ALLOCATIONS
from shardprune.solvers.allocation.budget import HIGHEST
from shardprune.solvers.improving import LEAST_SAMPLES, Improving
from shardprune.solvers.methods import DAMPING, METHODS, Damping
from shardprune.solvers.pattern import Mixed, Pattern, Unstructured, parse_pattern
from shardprune.solvers.rebuilding import Granularity, Metric, Rebuilding
from shardprune.solvers.scoring import Scoring

if TYPE_CHECKING:
    MethodName = str
    AllocationName = str
else:
    MethodName = Literal[tuple(name for name, method in METHODS.items() if method.named)]
    AllocationName = Literal[tuple(ALLOCATIONS)]


def _damping(value: Any) -> Any:
    """Return a damping that is a number, also as text, or auto."""
    if value == "auto":
        return value
    try:
        number = float(value) if not isinstance(value, bool) else -1.0
    except (TypeError, ValueError):
        number = -1.0
    if not 0 <= number <= 1:
        raise ValueError("use a number from 0 to 1, or auto")
    return number


DampingValue = Annotated[Damping, BeforeValidator(_damping)]


class StructuredFields(WidthFields):
    """Removal of structures before weights become zero."""

    structured: float | None = Field(
        None, description="Fraction of weights to remove first, as key/value groups and neurons"
    )

    @field_validator("structured")
    @classmethod
    def _structured_in_range(cls, value: float | None) -> float | None:
        if value is not None and not 0 < value < 1:
            raise ValueError("use a number above 0 and below 1")
        return value

    def width_removal(self, outlier_m: float) -> WidthRemoval | None:
        """Return what is removed and how that is chosen; None where nothing is.

        Args:
            outlier_m: M of the score by outliers.
        """
        if self.structured is None:
            return None
        scoring = Scoring(self.score, self.correction, outlier_m)
        return WidthRemoval(self.structured, self.neuron_multiple, self.tensor_parallel, scoring)


class PruningFields(StructuredFields):
    """Method, amount and place of the zeros."""

    title: ClassVar[str] = "Pruning"

    method: MethodName = Field("sparsegpt", description="Pruning method")
    sparsity: float | None = Field(
        None, description="Fraction of weights to zero or remove, from 0 to below 1; not needed with N:M"
    )
    pattern: str = Field(
        "unstructured",
        description="unstructured, N:M (at most N nonzeros in every M inputs) or mixed:M (N per layer)",
    )
    allocation: AllocationName = Field("uniform", description="Distribution of the sparsity; owl with mixed:M")
    allocation_file: str | None = optional(
        "none", "Sparsity of every projection: OUT/allocation.json of another run, or measured curves", min_length=1
    )
    ignore: Globs = Field(
        (), description="Projections to leave dense: a glob over names, such as *.mlp.down_proj; repeatable"
    )
    outlier_m: float = Field(
        5.0,
        gt=0,
        description="Outlier threshold M: a weight counts if its metric exceeds M x the mean",
    )
    outlier_lambda: float = Field(
        0.08,
        ge=0,
        le=0.5,
        description="lambda of an allocation by outliers: sparsities lie within target +- 2 lambda, from 0 to 0.5",
    )
    wanda_variant: bool = Field(False, description="Wanda's use_variant: per-row sparsity may differ")
    damping: DampingValue = Field(
        DAMPING,
        description="Fraction of the mean diagonal added to Gram matrices, from 0 to 1; auto: measured by projection",
    )
    refit: bool = Field(False, description="Fit the kept weights to the dense outputs where that is better held out")
    expert_tokens: Literal["routed", "all"] = Field(
        "routed", description="Calibration tokens that an expert is pruned by: those that are routed to it, or all"
    )

    @field_validator("sparsity")
    @classmethod
    def _sparsity_in_range(cls, value: float | None) -> float | None:
        if value is not None and not 0 <= value < 1:
            raise ValueError("use a number from 0 to below 1")
        return value

    @field_validator("pattern")
    @classmethod
    def _pattern_parses(cls, value: str) -> str:
        parse_pattern(value)
        return value

    @model_validator(mode="before")
    @classmethod
    def _mixed_is_allocated_by_owl(cls, values: Any) -> Any:
        if isinstance(values, dict) and str(values.get("pattern")).startswith("mixed"):
            return {"allocation": "owl", **values}
        return values

    def measures_solutions(self, towards_stream: bool) -> bool:
        """Return whether held-out windows choose between solutions of a projection. Where projections aim at the
        stream, they judge the layer instead."""
        return self.damping == "auto" or (self.refit and not towards_stream)

    def check_measured(self, samples: int, towards_stream: bool) -> None:
        """Check that windows can be held out of so many samples where solutions are measured, for sums over all inputs
        of a layer at a time.

        Raises:
            InputError: there are too few, or inputs are solved one after the other.
        """
        if self.damping == "auto" and towards_stream:
            reason = "'auto' does not go with targets stream, where held-out windows judge whole layers"
            raise InputError("damping", f"{reason}; use a number from 0 to 1")
        if self.expert_tokens == "all" and towards_stream:
            raise InputError("expert_tokens", "'all' does not go with targets stream; use routed")
        if self.measures_solutions(towards_stream) and samples < LEAST_SAMPLES:
            asked = "damping auto" if self.damping == "auto" else "refit"
            raise InputError(
                "samples", f"{samples} is too few for {asked}, which holds out some; use at least {LEAST_SAMPLES}"
            )

    @property
    def zeros(self) -> Pattern | Mixed:
        """The pattern of the zeros."""
        return parse_pattern(self.pattern)

    @property
    def zeroes(self) -> bool:
        """Whether any weights become zero, or structures go and nothing else."""
        return self.sparsity is not None or self.zeros.sparsity is not None

    @property
    def target(self) -> float:
        """The fraction of the projections' weights that become zero or are removed."""
        removed, fixed = self.structured or 0.0, self.zeros.sparsity
        if fixed is not None:
            return removed + (1 - removed) * fixed
        return removed if self.sparsity is None else self.sparsity

    @property
    def zeroing(self) -> Zeroing:
        """The zeroing of weights: method, pattern, target and allocation."""
        return Zeroing(
            method=f"{self.method}-variant" if self.wanda_variant else self.method,
            pattern=self.zeros,
            target=self.target,
            allocation=self.allocation,
            outlier_m=self.outlier_m,
            spread=self.outlier_lambda,
            refit=self.refit,
            damping=self.damping,
            all_tokens=self.expert_tokens == "all",
        )

    @model_validator(mode="after")
    def _sparsity_fits_pattern(self) -> "PruningFields":
        zeros = self.zeros
        if not self.zeroes and (self.structured is None or isinstance(zeros, Mixed)):
            raise InputError("sparsity", "missing; give a number from 0 to below 1, or a pattern such as 2:4")
        if zeros.sparsity is not None and self.sparsity is not None and abs(self.sparsity - self.target) > 1e-9:
            raise InputError(
                "sparsity", f"{self.sparsity} does not fit the pattern {self.pattern}, which is {self.target:g}"
            )
        if isinstance(zeros, Mixed) and self.target > 1 - 1 / zeros.m:
            raise InputError(
                "sparsity",
                f"{self.sparsity} is more than {self.pattern} can have, which keeps at least 1 of {zeros.m}; "
                f"use at most {1 - 1 / zeros.m:g}",
            )
        return self

    @model_validator(mode="after")
    def _allocation_fits(self) -> "PruningFields":
        observes, measures = self.zeroing.observes, self.zeroing.measures
        if isinstance(self.zeros, Mixed) and self.allocation != "owl":
            raise InputError("allocation", f"{self.allocation!r} does not fit the pattern {self.pattern}; use owl")
        if (observes or measures) and self.zeros.sparsity is not None:
            raise InputError(
                "allocation",
                f"{self.allocation!r} needs a sparsity to share out; {self.pattern} gives every projection "
                f"{self.zeros.sparsity:g}: use uniform, or the pattern mixed:M",
            )
        share = self.zeroing.of_rest(self.structured or 0.0)
        if measures and self.zeroes and share == 0:
            raise InputError("sparsity", f"{self.target} leaves {self.allocation} nothing to share out; use more")
        if (observes or measures) and share >= HIGHEST:
            raise InputError(
                "sparsity",
                f"{self.target} leaves {self.allocation} no room, which takes at most {HIGHEST} of any projection; "
                f"use less than {HIGHEST}, or allocation uniform",
            )
        if self.allocation_file is not None:
            if self.allocation != "uniform" or not isinstance(self.zeros, Unstructured):
                other = "allocation" if self.allocation != "uniform" else "pattern"
                raise InputError(
                    "allocation_file",
                    f"{self.allocation_file!r} does not go with {other} {getattr(self, other)}, which says itself what "
                    "a projection gives up",
                )
            if self.structured is not None:
                raise InputError(
                    "allocation_file",
                    f"{self.allocation_file!r} does not go with structured, after which projections are smaller",
                )
        self.needs("an allocation by outliers (owl, mosaic)", observes, "outlier_lambda")
        looks = observes or (self.structured is not None and self.score == "outlier")
        self.needs("an allocation (owl, mosaic) or a score (outlier) that looks at them", looks, "outlier_m")
        varies = self.method == "wanda" and isinstance(self.zeros, Unstructured)
        self.needs("method wanda and pattern unstructured", varies, "wanda_variant")
        seen = METHODS[self.method].needs is not None or self.refit or observes
        self.needs("a method or an allocation that looks at activations, or refit", seen, "expert_tokens")
        damped = METHODS[self.method].needs == "gram" or self.refit
        self.needs("a method that takes Gram matrices (sparsegpt, alps) or refit", damped, "damping")
        return self

    @model_validator(mode="after")
    def _structure_fits(self) -> "PruningFields":
        self.needs("structured", self.structured is not None, *WidthFields.model_fields)
        self.needs(
            *("a sparsity or a pattern N:M", self.zeroes),
            *("method", "allocation", "refit", "damping", "expert_tokens", "ignore"),
        )
        if self.structured is None:
            return self
        if isinstance(self.zeros, Mixed):
            raise InputError(
                "pattern", f"{self.pattern!r} does not go with structured, after which N cannot average to the target"
            )
        if self.sparsity is not None and self.sparsity < self.structured:
            raise InputError("sparsity", f"{self.sparsity} is less than structured removes, {self.structured}")
        return self


class BarberFields(Settings):
    """Mask rebuilding with LLM-Barber."""

    title: ClassVar[str] = "Mask rebuilding"

    rebuild_threshold: float = Field(
        0.01, ge=0, le=1, description="Fraction of the improving pairs to swap, from 0 to 1"
    )
    rebuild_granularity: Granularity = Field("row", description="Scope in which pruned and kept weights are paired")
    rebuild_metric: Metric = Field("weight-gradient", description="Importance of a weight")
    keep_corrected: bool = Field(False, description="Keep corrected weights instead of restoring dense ones")

    @property
    def swapping(self) -> Rebuilding:
        """The rule by which masks are rebuilt."""
        return Rebuilding(self.rebuild_threshold, self.rebuild_granularity, self.rebuild_metric, self.keep_corrected)


class OptionalBarberFields(BarberFields):
    """Mask rebuilding after pruning, if it is asked for."""

    rebuild: Literal["none", "barber"] = Field("none", description="Mask rebuilding after each layer is pruned")

    @model_validator(mode="after")
    def _options_have_an_effect(self) -> "OptionalBarberFields":
        self.needs("rebuild barber", self.rebuild == "barber", *BarberFields.model_fields)
        return self

    @property
    def rebuilding(self) -> Rebuilding | None:
        """The rule by which masks are rebuilt; None if they are not."""
        return self.swapping if self.rebuild == "barber" else None


class ZeroingFields(
    QualityFields,
    PruningFields,
    CalibrationFields,
    EvaluationFields,
    StructuredFields,
    OptionalBarberFields,
    ImprovingFields,
):
    """What a run and a plan of one say alike, and what follows from it."""

    @property
    def stream_is_safe(self) -> bool:
        """Whether `auto` aims at the dense stream: the one place that says so. On text of another kind than that which
        counts it harms, which no window of that text can tell; what the model writes is like what it reads. A training
        comes to the same place without it."""
        asked = self.damping == "auto" or self.expert_tokens == "all"
        hindered = self.rebuilding is not None or asked or self.samples < LEAST_SAMPLES
        written = any(part.is_written or part.folder for part in self.parts)
        return self.zeroes and written and not hindered and not self.reconstruct

    @model_validator(mode="after")
    def _windows_can_be_held_out(self) -> "ZeroingFields":
        self.needs("a sparsity or a pattern N:M", self.zeroes, "rebuild", "targets")
        self.check_improving(self.samples, self.rebuilding)
        self.check_measured(self.samples, self.towards_stream)
        return self

    @property
    def measured(self) -> Improving:
        """The steps that improve a layer, and whether windows are held out for the solutions."""
        return replace(self.improving, measured=self.measures_solutions(self.towards_stream))


class PruneRecipe(ZeroingFields, ExpertFields, ModelOutputFields):
    """The recipe of `shardprune prune`."""

    command: ClassVar[str] = "prune"
    shaping: ClassVar[tuple[type[Settings], ...]] = (
        PruningFields,
        OptionalBarberFields,
        ImprovingFields,
    )  # every field of them shapes the tensors

    model: str = Field(min_length=1, description="Checkpoint: directory, URL or hub name")

    @model_validator(mode="after")
    def _masks_are_made_before_they_are_rebuilt(self) -> "PruneRecipe":
        replaced = self.rebuilding is not None and not self.keep_corrected
        if self.rebuilding is not None and self.expert_chunks > 1:
            raise InputError(
                "expert_chunks", f"{self.expert_chunks} does not go with rebuild, which keeps the sums of a whole layer"
            )
        self.needs("a sparsity or a pattern N:M", self.zeroes, "expert_chunks")
        self.needs("keep_corrected: rebuild barber puts the dense weights back", not replaced, "refit")
        return self

    def job(self) -> PruningJob:
        """Return the job of the run that zeroes weights."""
        return PruningJob(self.zeroing, None, self.rebuilding, self.measure_error, self.measured)

    def shape(self) -> dict[str, Any]:
        """Return what shapes the tensors, beside model, text and layout."""
        return (
            shape_of(self, "ignore", "expert_tokens") | self.decided | {"sparsity": self.target}
        )  # which a pattern may fix

    @property
    def structures(self) -> "WidthRecipe":
        """The recipe of the run that removes structures, before weights become zero; layers are trained in the last
        run alone."""
        shared = set(WidthRecipe.model_fields) & set(PruneRecipe.model_fields)
        return WidthRecipe(**self.model_dump(include=shared) | ({"reconstruct": 0} if self.zeroes else {}))


class RemovalFields(StructuredFields):
    """Removal of structures as a run of its own."""

    structured: float
    outlier_m: float = 5.0


class WidthRecipe(
    RemovalFields, CalibrationFields, EvaluationFields, TrainingFields, PruneWorkerFields, ModelOutputFields
):
    """The removal of structures: the first run of `shardprune prune --structured`, or all of it."""

    command: ClassVar[str] = "prune"
    shaping: ClassVar[tuple[type[Settings], ...]] = (RemovalFields, TrainingFields)

    model: str

    def job(self) -> PruningJob:
        """Return the job of the run that removes structures."""
        removal, improving = self.width_removal(self.outlier_m), Improving(reconstruction=self.reconstruct)
        return PruningJob(None, removal, None, self.measure_error, improving)

    def shape(self) -> dict[str, Any]:
        """Return what shapes the tensors, beside model, text and layout."""
        return self.model_dump(include=shaping_fields(self)) | {"sparsity": self.structured}


class PrunedFields(Settings):
    """The pruned checkpoint."""

    title: ClassVar[str] = "Pruned model"

    pattern: str = Field(
        "auto", description="auto detects the pattern of each projection; N:M is verified; or unstructured"
    )

    @field_validator("pattern")
    @classmethod
    def _pattern_parses(cls, value: str) -> str:
        if value != "auto" and isinstance(parse_pattern(value), Mixed):
            raise ValueError("use auto, which finds N of every layer")
        return value


class RebuildRecipe(
    PrunedFields, BarberFields, CalibrationFields, EvaluationFields, PruneWorkerFields, ModelOutputFields
):
    """The recipe of `shardprune rebuild`."""

    command: ClassVar[str] = "rebuild"
    shaping: ClassVar[tuple[type[Settings], ...]] = (PrunedFields, BarberFields)

    model: str = Field(min_length=1, description="Dense checkpoint: directory, URL or hub name")
    sparse: str = Field(min_length=1, description="The same model, pruned by any tool")

    def job(self) -> PruningJob:
        """Return the job of the run that rebuilds masks."""
        return PruningJob(Adopted(self.sparse, self.pattern), None, self.swapping, self.measure_error)

    def shape(self) -> dict[str, Any]:
        """Return what shapes the tensors, beside models, text and layout."""
        return self.model_dump(include=shaping_fields(self))
