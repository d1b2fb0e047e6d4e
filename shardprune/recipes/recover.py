"""The recipe of `shardprune recover`."""

from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from shardprune.errors import InputError
from shardprune.recipes.groups import BackendFields, OutputFields, PerplexityFields, check_survives_ray_job
from shardprune.recipes.settings import Settings, positive
from shardprune.storage.sources import DATA_FORMS, check_data

LORA_RATE, FULL_RATE = 3e-4, 2e-5  # MoP's for low-rank updates; a tenth of it or less where all weights move


class LearningFields(Settings):
    """How it learns"""

    full: bool = Field(False, description="Train all weights, instead of low-rank updates of the projections")
    lora_rank: int = positive(32, "Rank of the updates, which are merged into the weights at the end")
    lora_alpha: float = Field(10.0, gt=0, description="The updates count alpha / rank times")
    lora_dropout: float = Field(0.05, ge=0, lt=1, description="Share of an update's inputs that is dropped")
    keep_sparsity: bool = Field(False, description="Zeros of the projections stay zeros")
    epochs: float = Field(2.0, gt=0, allow_inf_nan=False, description="Passes over the data")
    steps: int | None = positive(None, "Steps, instead of epochs")
    batch: int = positive(16, "Rows of a step, over all workers")
    micro_batch: int | None = positive(
        None, "Rows that pass through a worker together (default: up to 4096 tokens' worth)"
    )
    learning_rate: float | None = Field(
        None, gt=0, allow_inf_nan=False, description=f"Highest rate (default: {LORA_RATE}, with full {FULL_RATE})"
    )
    schedule: Literal["cosine", "linear", "constant"] = Field("linear", description="How the rate falls")
    warmup: float = Field(0.03, ge=0, lt=1, description="Share of the steps over which the rate rises first")
    weight_decay: float = Field(0.0, ge=0, allow_inf_nan=False, description="Decay of the weights, decoupled (AdamW)")
    clip: float = Field(1.0, ge=0, allow_inf_nan=False, description="Largest norm of a step's gradient; 0 is no limit")

    @property
    def highest_rate(self) -> float:
        """The learning rate that the schedule starts from."""
        return self.learning_rate or (FULL_RATE if self.full else LORA_RATE)

    @model_validator(mode="after")
    def _low_rank_options_have_an_effect(self) -> "LearningFields":
        self.needs("low-rank updates (no --full)", not self.full, "lora_rank", "lora_alpha", "lora_dropout")
        if self.steps is not None and self.epochs != type(self).model_fields["epochs"].default:
            raise InputError("epochs", f"{self.epochs:g} has no effect beside steps; give one of the two")
        return self


class DataFields(Settings):
    """What it learns from"""

    data: str = Field(min_length=1, description=f"Source of the data: {DATA_FORMS}")
    length: int = Field(512, ge=2, description="Tokens of a row at most")
    packing: bool = Field(False, description="Put several examples into a row; none sees another")
    prompt_loss: bool = Field(False, description="Learn the prompts of instruction data, too, not the responses alone")
    held_out: float = Field(0.0, ge=0, lt=1, description="Share of the rows that is not learned from but measured on")
    seed: int = Field(0, description="Seed of the order, of the updates' start and of dropout")

    @field_validator("data")
    @classmethod
    def _known_source(cls, value: str) -> str:
        check_data(value)
        return value


class TeachingFields(Settings):
    """Distillation"""

    teacher: str | None = Field(None, description="Model whose predictions are learned, too, such as the dense one")
    temperature: float = Field(2.0, gt=0, allow_inf_nan=False, description="By which both models' logits are divided")
    teacher_weight: float = Field(
        0.5, gt=0, le=1, description="Share of the teacher in the loss; the rest is the data's own"
    )

    @model_validator(mode="after")
    def _needs_a_teacher(self) -> "TeachingFields":
        self.needs("teacher", self.teacher is not None, "temperature", "teacher_weight")
        return self


class ZeroFields(Settings):
    """DeepSpeed"""

    zero: int = Field(
        2, ge=0, le=3, description="What ZeRO partitions: 1 optimizer states, 2 gradients too, 3 weights too; 0 nothing"
    )
    offload: bool = Field(False, description="Keep optimizer states, with stage 3 weights too, in the hosts' memory")
    precision: Literal["auto", "bf16", "fp32"] = Field(
        "auto", description="Of the computation; auto is bf16 on GPUs, fp32 on CPUs"
    )
    recompute: bool = Field(False, description="Compute activations again in the backward pass instead of keeping them")
    deepspeed: str | None = Field(None, description="JSON file with further settings of DeepSpeed, which override")
    checkpoint_every: int = positive(100, "Steps between two checkpoints of the training, and held-out losses")
    state: str | None = Field(
        None, description="Directory for them that all nodes see (default: OUT/training; needed where OUT is a URL)"
    )

    @field_validator("state")
    @classmethod
    def _state_lasts(cls, value: str | None) -> str | None:
        if value is not None:
            check_survives_ray_job("state", value)
        return value


class TrainerFields(BackendFields):
    """Workers"""

    workers: int | None = positive(None, "Processes that train together (default: one per GPU; on CPUs 1)")


class WindowFields(Settings):
    """Evaluation"""

    seqlen: int = Field(2048, ge=2, description="Tokens of a window of perplexity")


class MeasuringFields(PerplexityFields, WindowFields):
    """Evaluation"""


class RecoverRecipe(
    LearningFields, DataFields, TeachingFields, ZeroFields, MeasuringFields, TrainerFields, OutputFields
):
    """Everything that `shardprune recover` does."""

    command: ClassVar[str] = "recover"
    # What decides the weights, but for rounding: another number of workers or stage goes on with the same training.
    shaping: ClassVar[tuple[type[Settings], ...]] = (LearningFields, DataFields, TeachingFields)

    model: str = Field(min_length=1, description="Directory, URL or hub name of the pruned checkpoint")

    @classmethod
    def identifying_fields(cls) -> set[str]:
        """The fields that say which training it is: the state of one stage of ZeRO is not that of another."""
        shaping = {name for group in cls.shaping for name in group.model_fields} - {"micro_batch"}
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
