"""The recipe of `shardprune plan-recovery`: a run of `shardprune recover`, and the machines."""

import re
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from shardprune.errors import InputError
from shardprune.planning.recipe import Machine
from shardprune.recipes.groups import WAVE_TOKENS, WORKERS
from shardprune.recipes.recover import DROPOUT, LearningFields, RecoverRecipe, check_stage, dropout_of
from shardprune.recipes.settings import Settings, optional


class TrainedFields(Settings):
    """The size of a fine-tuning."""

    title: ClassVar[str] = LearningFields.title

    full: bool = Field(False, description="Train all weights instead of LoRA")
    lora_rank: int = Field(32, ge=1, description="LoRA rank")
    lora_alpha: float = Field(10.0, gt=0, description="LoRA alpha, which changes no size")
    lora_dropout: float | None = optional(f"{DROPOUT}, with keep_sparsity 0", "LoRA dropout probability", ge=0, lt=1)
    keep_sparsity: bool = Field(False, description="Keep the zeros of the projections")
    batch: int = Field(16, ge=1, le=1_000_000, description="Global batch size, in rows")
    micro_batch: int | None = optional(f"{WAVE_TOKENS} / length", "Micro-batch size per worker, in rows", ge=1)
    length: int = Field(512, ge=2, description="Tokens per row")
    teacher: str | None = Field(None, description="Teacher: config.json, or checkpoint directory, URL or hub name")
    teacher_top: int | None = Field(
        None, ge=1, description="Store the teacher's K largest predictions of each token before the training"
    )
    images: str | None = Field(None, description="Images that rows show, as of recover; none is read")
    images_per_row: int = Field(1, ge=1, le=1000, description="Images that a row shows")
    image_size: str | None = optional(
        "the image_size of the model's config", "Pixels of an image, WIDTHxHEIGHT, where its tokens depend on them"
    )
    seed: int = Field(0, description="Random seed, which changes no size")

    @property
    def pixels(self) -> tuple[int, int] | None:
        """Width and height of an image, if they are said."""
        if self.image_size is None:
            return None
        width, _, height = self.image_size.partition("x")
        return int(width), int(height)

    @field_validator("image_size")
    @classmethod
    def _is_a_size(cls, value: str | None) -> str | None:
        if value is not None and not re.fullmatch(r"[1-9]\d{0,4}x[1-9]\d{0,4}", value, re.ASCII):
            raise InputError("image_size", f"{value!r} is no WIDTHxHEIGHT of at most five digits each, as 1280x720")
        return value

    @property
    def dropout(self) -> float:
        """The probability with which a low-rank update does not see an input."""
        return dropout_of(self.lora_dropout, self.keep_sparsity)

    @model_validator(mode="after")
    def _low_rank_options_have_an_effect(self) -> "TrainedFields":
        self.needs("low-rank updates (no --full)", not self.full, "lora_rank", "lora_alpha", "lora_dropout")
        self.needs("teacher", self.teacher is not None, "teacher_top")
        self.needs("images", self.images is not None, "images_per_row", "image_size")
        return self


class SharingFields(Settings):
    """Ways to share a fine-tuning out."""

    title: ClassVar[str] = "DeepSpeed"

    zero: int | None = optional("all", "ZeRO stage", ge=0, le=3)
    offload: bool | None = optional("both", "Offload optimizer states (stage 3: also weights) to host memory")
    precision: Literal["auto", "bf16", "fp32"] = Field(
        "auto", description="Training precision; auto: bf16 on GPUs, fp32 on CPUs"
    )
    recompute: bool | None = optional("both", "Recompute activations (gradient checkpointing)")
    workers: int | None = optional("GPUs", "Training processes", ge=1, le=WORKERS)


class TrainingPlanRecipe(Machine, TrainedFields, SharingFields):
    """The recipe of `shardprune plan-recovery`.

    Recipes of `shardprune recover` are accepted; fields that a plan does not depend on are ignored.
    """

    ignored: ClassVar[frozenset[str]] = frozenset(RecoverRecipe.model_fields)

    model: str = Field(min_length=1, description="config.json, or checkpoint directory, URL or hub name")

    @model_validator(mode="before")
    @classmethod
    def _what_only_a_run_needs(cls, values: Any) -> Any:
        """Leave out fields of a run's recipe that a plan does not depend on."""
        if not isinstance(values, dict):
            return values
        return {name: value for name, value in values.items() if name in cls.model_fields or name not in cls.ignored}

    @model_validator(mode="after")
    def _batch_is_shared_evenly(self) -> "TrainingPlanRecipe":
        if self.processes > self.nodes * self.gpus:
            there = self.nodes * self.gpus
            raise InputError("workers", f"{self.processes} workers need as many GPUs; the machines have {there}")
        part = self.processes * (self.micro_batch or 1)
        if self.batch % part:
            each = f" with micro-batches of {self.micro_batch}" if self.micro_batch else ""
            reason = f"{self.batch} cannot be shared evenly by {self.processes} processes{each}"
            raise InputError("batch", f"{reason}; use a multiple of {part}")
        if self.offload and self.zero == 0:
            raise InputError("offload", "True has no effect without zero 1, 2 or 3")
        check_stage(self.zero, self.bf16)
        return self

    @property
    def processes(self) -> int:
        """Training processes, one for each GPU unless it is said."""
        return self.workers or self.nodes * self.gpus

    @property
    def bf16(self) -> bool:
        """Whether weights are trained in bfloat16."""
        return self.precision == "bf16" or (self.precision == "auto" and self.row.gpu)
