"""The recipe of `shardprune evaluate`."""

from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from shardprune.errors import InputError
from shardprune.recipes.groups import WorkerFields, check_survives_ray_job
from shardprune.recipes.settings import Settings, positive
from shardprune.storage.sources import FORMS, check_source


class PerplexityFields(Settings):
    """Perplexity"""

    perplexity: tuple[str, ...] = Field((), description=f"Source of a text, repeatable: {FORMS}")
    seqlen: int = Field(2048, ge=2, description="Tokens of a window")
    windows: int | None = positive(None, "Use the first windows of each source only (default: all)")

    @field_validator("perplexity", mode="before")
    @classmethod
    def _one_source_or_several(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @field_validator("perplexity")
    @classmethod
    def _known_sources(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for source in value:
            check_source("perplexity", source)
        return value


class TaskFields(Settings):
    """Tasks of lm-eval"""

    tasks: tuple[str, ...] = Field(
        (), description="Tasks, groups, patterns such as blimp_*, or zeroshot (eight tasks), with commas or repeated"
    )
    tasks_dir: str | None = Field(None, description="Directory of tasks of your own, as YAML files of lm-eval")
    limit: int | None = positive(None, "Evaluate the first documents of each task only (default: all)")
    num_fewshot: int | None = Field(None, ge=0, description="Examples before each question (default: the task's own)")
    engine: Literal["shards", "hf"] = Field(
        "shards", description="What answers: the workers, or lm-eval's own model, whole in this process"
    )

    @field_validator("tasks", mode="before")
    @classmethod
    def _split_at_commas(cls, value: Any) -> Any:
        entries = (value,) if isinstance(value, str) else value
        if not isinstance(entries, list | tuple) or not all(isinstance(entry, str) for entry in entries):
            return value
        names = [name.strip() for entry in entries for name in entry.split(",")]
        return tuple(dict.fromkeys(name for name in names if name))


class ShardFields(WorkerFields):
    """Workers"""

    shards: int | None = positive(None, "Contiguous runs of layers, each on workers of its own (default: 1)")
    replicas: int | None = positive(None, "Workers per shard, sharing the texts (default: the GPUs left over)")
    weights: Literal["resident", "streamed"] = Field(
        "resident", description="Keep a shard's layers, or read each when its turn comes"
    )
    wave: int | None = positive(
        None, "Texts that move through the shards together, or hf's batch size (default: 4096 tokens' worth, or 1)"
    )


class DestinationFields(Settings):
    """Result"""

    out: str | None = Field(
        None, description="Directory or URL for result.json (default: the model's own, where it has a result.json)"
    )
    report: bool = Field(True, description="Write report.html beside result.json")

    @field_validator("out")
    @classmethod
    def _out_lasts(cls, value: str | None) -> str | None:
        if value is not None:
            check_survives_ray_job("out", value)
        return value


class EvaluateRecipe(PerplexityFields, TaskFields, ShardFields, DestinationFields):
    """Everything that `shardprune evaluate` does."""

    command: ClassVar[str] = "evaluate"
    shaping: ClassVar[tuple[type[Settings], ...]] = (PerplexityFields, TaskFields)

    model: str = Field(min_length=1, description="Directory, URL or hub name of the checkpoint")

    @model_validator(mode="after")
    def _something_is_measured(self) -> "EvaluateRecipe":
        if not self.perplexity and not self.tasks:
            raise InputError("perplexity", "missing; give a source, or tasks")
        self.needs("perplexity", bool(self.perplexity), "seqlen", "windows")
        self.needs("tasks", bool(self.tasks), "tasks_dir", "limit", "num_fewshot", "engine")
        return self
