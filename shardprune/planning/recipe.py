"""What is planned: the run, as `shardprune prune` is told it, and the machines."""

import re
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from shardprune.errors import InputError
from shardprune.planning.hardware import CONTEXT_BYTES, HARDWARE, Hardware
from shardprune.recipes.groups import CalibrationFields, EvaluationFields
from shardprune.recipes.prune import OptionalBarberFields, PruneRecipe, PruningFields, StructuredFields
from shardprune.recipes.settings import Settings, positive
from shardprune.storage.quantities import gigabytes, parse_bytes

if TYPE_CHECKING:
    HardwareName = str
else:
    HardwareName = Literal[tuple(HARDWARE)]

ANY_SPARSITY = 0.5  # where none is given: no size depends on it


class Machine(Settings):
    """Machines"""

    nodes: int = Field(1, ge=1, description="Machines with the same GPUs")
    gpus: int = Field(1, ge=1, description="GPUs of a node; with hardware cpu, workers of a node")
    gpu_memory: str | None = Field(None, description="Memory of a GPU, such as 80GB (default: the hardware's)")
    hardware: HardwareName = Field("h100", description="Whose rates to reckon with")
    host_memory: str | None = Field(None, description="Memory of a node, such as 1TB (default: the hardware's)")
    network: str | None = Field(
        None, description="What a node sends and receives, such as 25GB/s or 100Gbit/s (default: the hardware's)"
    )
    storage: str | None = Field(
        None, description="What a node reads from where the weights lie, such as 5GB/s (default: the hardware's)"
    )

    @field_validator("gpu_memory", "host_memory")
    @classmethod
    def _size(cls, value: str | None) -> str | None:
        if value is not None:
            parse_bytes(value)
        return value

    @field_validator("gpu_memory")
    @classmethod
    def _beyond_a_context(cls, value: str | None) -> str | None:
        if value is not None and parse_bytes(value) <= CONTEXT_BYTES:
            raise ValueError(f"use more than the {gigabytes(CONTEXT_BYTES)} that a CUDA context takes")
        return value

    @field_validator("network", "storage")
    @classmethod
    def _rate(cls, value: str | None) -> str | None:
        if value is not None:
            parse_bytes(value, rate=True)
        return value

    @property
    def row(self) -> Hardware:
        """The rates of the hardware, those given instead of the table's."""
        row = HARDWARE[self.hardware]
        given: dict[str, Any] = {
            "bytes": self.gpu_memory and parse_bytes(self.gpu_memory),
            "host": self.host_memory and max(1, parse_bytes(self.host_memory) // self.gpus),
            "network": self.network and parse_bytes(self.network, rate=True),
            "storage": self.storage and parse_bytes(self.storage, rate=True),
        }
        attained = row.attained()
        return Hardware(**{**vars(attained), **{name: value for name, value in given.items() if value}})


class Choices(Settings):
    """Layout"""

    propagation: Literal["exact", "parallel", "both"] = Field("both", description="Which to plan")
    shards: int | None = positive(None, "Contiguous runs of layers (default: chosen)")
    replicas: int | None = positive(None, "Workers per shard, sharing the samples (default: chosen)")
    segments: int | None = positive(None, "Runs of layers that parallel propagation prunes independently")
    weights: Literal["auto", "resident", "streamed"] = Field(
        "auto", description="Keep a shard's layers, or read each when its turn comes"
    )
    activations: Literal["auto", "device", "host"] = Field("auto", description="Where the waves are kept")
    dtype: Literal["auto", "float32"] = Field("auto", description="What the workers compute in")


class PlanRecipe(
    Machine, Choices, PruningFields, CalibrationFields, EvaluationFields, StructuredFields, OptionalBarberFields
):
    """Everything that `shardprune plan` looks at.

    It takes the recipes of `shardprune prune` and passes over what a plan does not depend on; structured pruning and
    mask rebuilding are not planned, and refused.
    """

    ignored: ClassVar[frozenset[str]] = frozenset(PruneRecipe.model_fields) - {*Choices.model_fields}
    unlisted: ClassVar[tuple[type[Settings], ...]] = (StructuredFields, OptionalBarberFields)

    model: str = Field(min_length=1, description="config.json, or the directory, URL or hub name of a checkpoint")

    @model_validator(mode="before")
    @classmethod
    def _what_only_a_run_needs(cls, values: Any) -> Any:
        """Leave out fields of a run's recipe that a plan does not depend on."""
        if not isinstance(values, dict):
            return values
        kept = {name: value for name, value in values.items() if name in cls.model_fields or name not in cls.ignored}
        fixed = re.fullmatch(r"\d+:\d+", str(kept.get("pattern")))
        return kept if fixed or kept.get("sparsity") is not None else {**kept, "sparsity": ANY_SPARSITY}

    @model_validator(mode="after")
    def _is_planned(self) -> "PlanRecipe":
        for field in ("structured", "rebuild"):
            if getattr(self, field) != type(self).model_fields[field].default:
                raise InputError(field, f"{getattr(self, field)!r} is not planned; plan the run without it")
        return self
