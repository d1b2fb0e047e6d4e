"""The recipe of `shardprune recover`."""

from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from shardprune.errors import InputError
from shardprune.recipes.groups import (
    OFFERED,
    WAVE_TOKENS,
    WORKERS,
    BackendFields,
    ModelOutputFields,
    PerplexityFields,
    TrainingMixture,
    check_survives_ray_job,
)
from shardprune.recipes.settings import Settings, optional
from shardprune.storage.mixture import TRAINING, Part, parse_parts

LORA_RATE, FULL_RATE = 3e-4, 2e-5  # MoP's for low-rank updates; a tenth of it or less where all weights move
DROPOUT = 0.05  # MoP's; a masked update without dropout is one product with its weight, with it another one


def check_stage(zero: int | None, bf16: bool) -> None:
    """Check that a stage of ZeRO, if one is chosen, goes with the precision.

    Raises:
        InputError: stage 0 is to train in bfloat16.
    """
    if zero == 0 and bf16:
        # DeepSpeed's optimizer of that stage takes a step with no gradients first, so that Adam counts one too many.
        raise InputError("zero", "0 does not go with bf16; use 1, which is the same training, or precision fp32")


def dropout_of(given: float | None, keep_sparsity: bool) -> float:
    """Return the probability with which a low-rank update does not see an input: the one that is given, or else none
    where zeros are kept."""
    if given is not None:
        return given
    return 0.0 if keep_sparsity else DROPOUT


class LearningFields(Settings):
    """Hyperparameters of the fine-tuning."""

    title: ClassVar[str] = "Training"

    full: bool = Field(False, description="Train all weights instead of LoRA")
    lora_rank: int = Field(32, ge=1, description="LoRA rank; updates are merged at the end")
    lora_alpha: float = Field(10.0, gt=0, description="LoRA alpha (updates are scaled by alpha / rank)")
    lora_dropout: float | None = optional(f"{DROPOUT}, with keep_sparsity 0", "LoRA dropout probability", ge=0, lt=1)
    keep_sparsity: bool = Field(False, description="Keep the zeros of the projections")
    epochs: float = Field(2.0, gt=0, le=1_000_000, description="Number of epochs")
    steps: int | None = Field(None, ge=1, description="Number of steps, instead of epochs")
    batch: int = Field(16, ge=1, le=1_000_000, description="Global batch size, in rows")
    micro_batch: int | None = optional(f"{WAVE_TOKENS} / length", "Micro-batch size per worker, in rows", ge=1)
    learning_rate: float | None = optional(f"{LORA_RATE}, full {FULL_RATE}", "Peak learning rate", gt=0)
    schedule: Literal["cosine", "linear", "constant"] = Field("linear", description="Learning-rate schedule")
    warmup: float = Field(0.03, ge=0, lt=1, description="Warm-up, as a fraction of steps")
    weight_decay: float = Field(0.0, ge=0, description="Decoupled weight decay (AdamW)")
    clip: float = Field(1.0, ge=0, description="Gradient norm limit; 0 for none")

    @property
    def highest_rate(self) -> float:
        """The learning rate that the schedule starts from."""
        return self.learning_rate or (FULL_RATE if self.full else LORA_RATE)

    @property
    def dropout(self) -> float:
        """The probability with which a low-rank update does not see an input."""
        return dropout_of(self.lora_dropout, self.keep_sparsity)

    @model_validator(mode="after")
    def _low_rank_options_have_an_effect(self) -> "LearningFields":
        self.needs("low-rank updates (no --full)", not self.full, "lora_rank", "lora_alpha", "lora_dropout")
        if self.steps is not None and self.epochs != type(self).model_fields["epochs"].default:
            raise InputError("epochs", f"{self.epochs:g} has no effect beside steps; give one of the two")
        return self


class DataFields(Settings):
    """Training data."""

    title: ClassVar[str] = "Data"

    data: TrainingMixture = Field(
        description=f"Data source: {TRAINING.forms}; repeatable",
        json_schema_extra={"offered": ["alpaca", *OFFERED]},
    )
    images: str | None = optional("DATA's", "Directory or URL of the images that conversations show")
    length: int = Field(512, ge=2, description="Maximum tokens per row")
    packing: bool = Field(False, description="Pack several examples per row, with attention kept separate")
    prompt_loss: bool = Field(False, description="Include prompts of instruction data in the loss")
    held_out: float = Field(0.0, ge=0, lt=1, description="Fraction of rows held out for validation")
    best: bool = Field(False, description="Write the weights with the lowest validation loss, not the last ones")
    evaluate_every: int | None = optional("checkpoint_every", "Steps between validation losses", ge=1)
    early_stopping: int | None = Field(
        None, ge=1, description="Stop after N validation losses in a row without a new lowest one"
    )
    seed: int = Field(0, description="Random seed for row order, LoRA weights and dropout")

    @property
    def parts(self) -> tuple[Part, ...]:
        """The sources of the data with their weights."""
        return parse_parts(self.data, TRAINING)

    @model_validator(mode="after")
    def _validation_needs_rows(self) -> "DataFields":
        self.needs("held_out", self.held_out > 0, "best", "early_stopping", "evaluate_every")
        return self


class TeachingFields(Settings):
    """Distillation from a teacher."""

    title: ClassVar[str] = "Distillation"

    teacher: str | None = Field(None, description="Teacher model, such as the dense checkpoint")
    temperature: float = Field(2.0, gt=0, le=1000, description="Distillation temperature")
    teacher_weight: float = Field(0.5, gt=0, le=1, description="Weight of the distillation loss")
    teacher_top: int | None = Field(
        None, ge=1, description="Store the teacher's K largest predictions of each token first, and learn from them"
    )

    @model_validator(mode="after")
    def _needs_a_teacher(self) -> "TeachingFields":
        self.needs("teacher", self.teacher is not None, "temperature", "teacher_weight", "teacher_top")
        return self


class ZeroFields(Settings):
    """DeepSpeed ZeRO and checkpoints of the training."""

    title: ClassVar[str] = "DeepSpeed"

    zero: int = Field(
        2, ge=0, le=3, description="ZeRO stage: 1 shards optimizer states, 2 also gradients, 3 also weights"
    )
    offload: bool = Field(False, description="Offload optimizer states (stage 3: also weights) to host memory")
    precision: Literal["auto", "bf16", "fp32"] = Field(
        "auto", description="Training precision; auto: bf16 on GPUs, fp32 on CPUs"
    )
    recompute: bool = Field(False, description="Recompute activations (gradient checkpointing)")
    deepspeed: str | None = Field(None, description="JSON file with DeepSpeed settings that override")
    checkpoint_every: int = Field(100, ge=1, description="Steps between training checkpoints")
    state: str | None = optional("OUT/training; none if OUT is a URL", "Shared directory for training checkpoints")

    @field_validator("state")
    @classmethod
    def _state_lasts(cls, value: str | None) -> str | None:
        if value is not None:
            check_survives_ray_job("state", value)
        return value


class TrainerFields(BackendFields):
    """Processes of the training."""

    workers: int | None = optional("GPUs; on CPUs 1", "Training processes", ge=1, le=WORKERS)


class WindowFields(Settings):
    """Windows of perplexity."""

    title: ClassVar[str] = "Evaluation"

    seqlen: int = Field(2048, ge=2, description="Tokens per perplexity window")


class MeasuringFields(PerplexityFields, WindowFields):
    """Perplexity before and after, and its windows."""


TRACKERS = {"tensorboard": "DIR", "wandb": "PROJECT", "mlflow": "EXPERIMENT"}


class TrackedOutputFields(ModelOutputFields):
    """Output of a training, and the tracker that shows it."""

    title: ClassVar[str] = "Output"

    track: str | None = optional("none", "Report steps to tensorboard:DIR, wandb:PROJECT or mlflow:EXPERIMENT")

    @field_validator("track")
    @classmethod
    def _names_a_tracker(cls, value: str | None) -> str | None:
        if value is None:
            return None
        kind, _, place = value.partition(":")
        if kind not in TRACKERS or not place:
            forms = ", ".join(f"{kind}:{place}" for kind, place in TRACKERS.items())
            raise InputError("track", f"{value!r} is no tracker; use one of {forms}")
        if kind == "tensorboard" and "://" in place:
            raise InputError("track", f"{value!r} is a URL; use a directory of the machine that the driver runs on")
        if kind == "tensorboard":
            check_survives_ray_job("track", place)
        return value


class RecoverRecipe(
    LearningFields, DataFields, TeachingFields, ZeroFields, MeasuringFields, TrainerFields, TrackedOutputFields
):
    """The recipe of `shardprune recover`."""

    command: ClassVar[str] = "recover"
    # What decides the weights, but for rounding: another number of workers or stage goes on with the same training.
    shaping: ClassVar[tuple[type[Settings], ...]] = (LearningFields, DataFields, TeachingFields)

    model: str = Field(min_length=1, description="Pruned checkpoint: directory, URL or hub name")

    @classmethod
    def identifying_fields(cls) -> set[str]:
        """The fields that say which training it is: the state of one stage of ZeRO is not that of another."""
        shaping = {name for group in cls.shaping for name in group.model_fields} - {"micro_batch", "images"}
        return shaping | {"model", "zero", "offload", "precision", "deepspeed"}

    @model_validator(mode="before")
    @classmethod
    def _zero_is_a_stage(cls, values: Any) -> Any:
        stage = values.get("zero") if isinstance(values, dict) else None
        if stage is not None and str(stage) not in {"0", "1", "2", "3"}:
            raise InputError("zero", f"{stage} is no stage of ZeRO; use 0, 1, 2 or 3")
        return values

    @model_validator(mode="after")
    def _something_is_partitioned(self) -> "RecoverRecipe":
        self.needs("zero 1, 2 or 3", self.zero > 0, "offload")
        return self

    @model_validator(mode="after")
    def _workers_fit(self) -> "RecoverRecipe":
        if self.backend == "local" and (self.workers or 1) > 1:
            raise InputError("workers", f"{self.workers} do not fit backend local, which is one process; use ray")
        if self.micro_batch and self.batch % self.micro_batch:
            raise InputError("micro_batch", f"{self.micro_batch} does not divide the batch of {self.batch}")
        if self.workers and self.batch % (self.workers * (self.micro_batch or 1)):
            each = f" with micro-batches of {self.micro_batch}" if self.micro_batch else ""
            raise InputError("workers", f"{self.workers} workers{each} cannot share a batch of {self.batch} evenly")
        return self
