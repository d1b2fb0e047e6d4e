"""The recipe of `shardprune evaluate`."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from shardprune.errors import InputError
from shardprune.recipes.groups import (
    OFFERED,
    WAVE_TOKENS,
    WORKERS,
    AskedLayout,
    Files,
    Sources,
    WorkerFields,
    check_survives_ray_job,
)
from shardprune.recipes.settings import Settings, optional
from shardprune.storage.sources import FORMS


class PerplexityFields(Settings):
    """Perplexity on texts."""

    title: ClassVar[str] = "Perplexity"

    perplexity: Sources = Field(
        (), description=f"Text source, repeatable: {FORMS}", json_schema_extra={"offered": [*OFFERED]}
    )
    seqlen: int = Field(2048, ge=2, description="Tokens per window")
    windows: int | None = optional("all", "Windows per source", ge=1)


class AnswerFields(Settings):
    """Answers about images."""

    title: ClassVar[str] = "Answers about images"

    answers: Files = Field(
        (),
        description="Conversations whose answers' perplexity is measured: FILE.json in LLaVA's form; repeatable",
    )
    images: str | None = optional("FILE's", "Directory or URL of their images")
    answers_length: int = Field(2048, ge=2, description="Maximum tokens per conversation")

    @field_validator("answers")
    @classmethod
    def _are_json(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for source in value:
            if not source.endswith(".json"):
                raise InputError("answers", f"{source!r} is no FILE.json of conversations")
        return value


class TaskFields(Settings):
    """Tasks of lm-eval."""

    title: ClassVar[str] = "Tasks"

    tasks: tuple[str, ...] = Field(
        (), description="lm-eval tasks, groups, patterns (blimp_*) or zeroshot; comma-separated or repeated"
    )
    tasks_dir: str | None = Field(None, description="Directory of your own lm-eval task YAML files")
    allow_task_code: bool = Field(False, description="Run Python and unsandboxed templates of those tasks")
    limit: int | None = optional("all", "Documents per task", ge=1)
    num_fewshot: int | None = optional("the task's", "Few-shot examples per question", ge=0)
    engine: Literal["shards", "hf"] = Field(
        "shards", description="shards: sharded workers; hf: lm-eval's model in this process"
    )

    @field_validator("tasks", mode="before")
    @classmethod
    def _split_at_commas(cls, value: Any) -> Any:
        entries = (value,) if isinstance(value, str) else value
        if not isinstance(entries, list | tuple) or not all(isinstance(entry, str) for entry in entries):
            return value
        names = [name.strip() for entry in entries for name in entry.split(",")]
        return tuple(dict.fromkeys(name for name in names if name))


class LatencyFields(Settings):
    """Tokens per second, and what the model writes."""

    title: ClassVar[str] = "Latency"

    latency: bool = Field(
        False, description="Measure prefill and decode tokens/s, whole in this process, in turn with the original"
    )
    latency_beside: str | None = optional("the original, by result.json", "Model that takes turns: as MODEL")
    latency_batches: tuple[Annotated[int, Field(ge=1, le=65536)], ...] = Field(
        (1, 8), min_length=1, description="Prompts that are read and answered together; repeatable"
    )
    latency_prompt: int = Field(512, ge=1, description="Tokens of a prompt")
    latency_tokens: int = Field(64, ge=1, description="Tokens that are written after it")
    latency_rounds: int = Field(5, ge=1, le=1000, description="Measurements of each model and batch")

    @field_validator("latency_batches", mode="before")
    @classmethod
    def _one_is_a_list(cls, value: Any) -> Any:
        return (value,) if isinstance(value, int | str) else value


class ShardFields(WorkerFields):
    """Shards and replicas of an evaluation."""

    shards: int | None = optional("1", "Number of contiguous runs of layers", ge=1)
    replicas: int | None = optional("GPUs / shards", "Workers per shard, sharing the texts", ge=1, le=WORKERS)
    weights: Literal["resident", "streamed"] = Field(
        "resident", description="resident keeps all layers in memory; streamed loads one at a time"
    )
    wave: int | None = optional(f"{WAVE_TOKENS} / tokens, hf 1", "Texts per micro-batch", ge=1)

    @property
    def asked(self) -> AskedLayout:
        return AskedLayout(self.shards, self.replicas, streamed=self.weights == "streamed")


class DestinationFields(Settings):
    """Output of an evaluation."""

    title: ClassVar[str] = "Output"

    out: str | None = optional("the model's, if it has one", "Directory or URL of result.json")
    report: bool = Field(True, description="Write report.html beside result.json")

    @field_validator("out")
    @classmethod
    def _out_lasts(cls, value: str | None) -> str | None:
        if value is not None:
            check_survives_ray_job("out", value)
        return value


class EvaluateRecipe(PerplexityFields, AnswerFields, TaskFields, LatencyFields, ShardFields, DestinationFields):
    """The recipe of `shardprune evaluate`."""

    command: ClassVar[str] = "evaluate"
    shaping: ClassVar[tuple[type[Settings], ...]] = (PerplexityFields, AnswerFields, TaskFields, LatencyFields)

    model: str = Field(min_length=1, description="Checkpoint: directory, URL or hub name")

    @model_validator(mode="after")
    def _something_is_measured(self) -> "EvaluateRecipe":
        if not self.perplexity and not self.answers and not self.tasks and not self.latency:
            raise InputError("perplexity", "missing; give a source, answers, tasks, or latency")
        self.needs("perplexity", bool(self.perplexity), "seqlen", "windows")
        self.needs("answers", bool(self.answers), "images", "answers_length")
        self.needs("tasks", bool(self.tasks), "tasks_dir", "limit", "num_fewshot", "engine")
        self.needs("latency", self.latency, *(name for name in LatencyFields.model_fields if name != "latency"))
        self.needs("tasks_dir", self.tasks_dir is not None, "allow_task_code")
        return self
