"""The recipe of `shardprune plan`: a run of `shardprune prune`, and the machines."""

import re
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import (
    BeforeValidator,
    ByteSize,
    Field,
    PlainSerializer,
    TypeAdapter,
    ValidationError,
    field_validator,
    model_validator,
)

from shardprune.errors import InputError
from shardprune.model.pruning_job import ExpertRemoval
from shardprune.planning.hardware import HARDWARE, Hardware
from shardprune.recipes.experts import ExpertFields
from shardprune.recipes.groups import WORKERS
from shardprune.recipes.improving import ImprovingFields, check_samples
from shardprune.recipes.prune import (
    OptionalBarberFields,
    PruneRecipe,
    PruningFields,
    ZeroingFields,
)
from shardprune.recipes.quality import QualityFields
from shardprune.recipes.settings import Settings, optional
from shardprune.shard.device_room import CONTEXT_BYTES
from shardprune.storage.quantities import gigabytes

if TYPE_CHECKING:
    HardwareName = str
else:
    HardwareName = Literal[tuple(HARDWARE)]

ScoreSource = Literal["pass", "statistics", "weights"]  # of experts
NOTHING_IS_ZEROED = "does not go with experts that are removed, where no weight becomes zero; leave it out"
ANY_SPARSITY = 0.5  # if none is given: no size depends on it
SIZE, RATE = "a size such as 80GB or 640GiB", "a rate such as 25GB/s or 100Gbit/s"


def _size(value: Any) -> Any:
    return _bytes(value, "b", SIZE)


def _rate(value: Any) -> Any:
    return _bytes(value.removesuffix("/s") if isinstance(value, str) else value, "(b|bit)", RATE)


def _bytes(value: Any, unit: str, example: str) -> Any:
    """The bytes of a text with a unit: ByteSize alone would take 80 for bytes, and bits for a size."""
    if value is None or isinstance(value, ByteSize):
        return value
    if re.fullmatch(r"\s*\d+(\.\d+)?\s*", str(value)):
        raise ValueError(
            f"a number needs its unit: use {str(value).strip()}GB{'/s' if unit != 'b' else ''}, or {example}"
        )
    if not isinstance(value, str) or not re.fullmatch(rf".*\d\s*([kmgt]i?)?{unit}\s*", value, re.IGNORECASE):
        raise ValueError(f"use {example}")
    try:
        count = TypeAdapter(ByteSize).validate_python(value)
    except ValidationError as error:
        raise ValueError(f"use {example}") from error
    if count < 1:
        raise ValueError("use more than nothing")
    return count


# Bytes and bytes per second; a recorded recipe has them with their unit, so that it can be read again.
Size = Annotated[ByteSize, BeforeValidator(_size), PlainSerializer(lambda size: f"{int(size)}B")]
Rate = Annotated[ByteSize, BeforeValidator(_rate), PlainSerializer(lambda rate: f"{int(rate)}B/s")]


class Machine(Settings):
    """Nodes and their hardware."""

    title: ClassVar[str] = "Machines"

    nodes: int = Field(1, ge=1, description="Number of nodes")
    gpus: int = Field(1, ge=1, description="GPUs per node; workers per node with hardware cpu")
    gpu_memory: Size | None = optional("the hardware's", "Memory of a GPU, such as 80GB")
    hardware: HardwareName = Field("h100", description="Hardware preset")
    host_memory: Size | None = optional("the hardware's", "Memory of a node, such as 1TB")
    network: Rate | None = optional("the hardware's", "Network rate of a node, such as 25GB/s or 100Gbit/s")
    storage: Rate | None = optional("the hardware's", "Read rate of a node from storage, such as 5GB/s")

    @field_validator("hardware", mode="before")
    @classmethod
    def _in_any_case(cls, value: Any) -> Any:
        return value.lower() if isinstance(value, str) else value

    @field_validator("gpu_memory")
    @classmethod
    def _beyond_a_context(cls, value: ByteSize | None) -> ByteSize | None:
        if value is not None and value <= CONTEXT_BYTES:
            raise ValueError(f"use more than the {gigabytes(CONTEXT_BYTES)} that a CUDA context takes")
        return value

    @property
    def row(self) -> Hardware:
        """The rates of the hardware, those given instead of the table's."""
        row = HARDWARE[self.hardware]
        given: dict[str, Any] = {
            "bytes": self.gpu_memory,
            "host": self.host_memory and max(1, self.host_memory // self.gpus),
            "network": self.network,
            "storage": self.storage,
        }
        attained = row.attained()
        return Hardware(**{**vars(attained), **{name: value for name, value in given.items() if value}})


class Choices(Settings):
    """Layout of the workers."""

    title: ClassVar[str] = "Layout"

    propagation: Literal["exact", "parallel", "both"] = Field("both", description="Propagation to plan")
    shards: int | None = optional("chosen", "Number of contiguous runs of layers", ge=1)
    replicas: int | None = optional("chosen", "Workers per shard, sharing the samples", ge=1, le=WORKERS)
    segments: int | None = optional("shards", "Independently pruned runs of layers (propagation parallel)", ge=1)
    weights: Literal["auto", "resident", "streamed"] = Field(
        "auto", description="resident keeps all layers in memory; streamed loads one at a time"
    )
    activations: Literal["auto", "device", "host"] = Field("auto", description="Memory for activations")
    expert_chunks: int | None = optional("chosen", "Parts in which a layer's experts are pruned", ge=1, le=1024)
    exchange: Literal["auto", "group", "store"] = Field(
        "auto", description="Tensors between workers: process group (NCCL, gloo) or object store; auto: group on GPUs"
    )
    dtype: Literal["auto", "float32"] = Field("auto", description="Compute dtype")


class RemovedExperts(Settings):
    """A run of `shardprune experts` in the place of one of `prune`."""

    title: ClassVar[str] = "Experts"

    remove_experts: float | None = Field(
        None, description="Plan `experts` instead of `prune`: fraction of each layer's experts to remove"
    )
    keep_experts: int | None = Field(
        None, ge=1, description="Plan `experts` instead of `prune`: number of experts that each layer keeps"
    )
    expert_multiple: int = Field(
        ExpertFields.model_fields["multiple"].default,
        ge=1,
        description="With remove_experts: round the experts that stay to a multiple",
    )
    merge_experts: bool = Field(False, description="With fewer experts: those whose outputs are alike are merged")
    expert_scores: ScoreSource = Field(
        "pass", description="With fewer experts: scores are from a pass, given statistics, or weights (aimer)"
    )
    propagate_experts: Literal["dense", "pruned"] = Field(
        "dense", description="With fewer experts: activations that a layer sees, dense or behind layers as they are cut"
    )
    router_kd: int = Field(0, ge=0, description="With fewer experts: steps of training each layer's router; 0: none")

    @model_validator(mode="after")
    def _one_amount(self) -> "RemovedExperts":
        share, number = self.remove_experts, self.keep_experts
        if share is not None and not 0 < share < 1:
            raise InputError("remove_experts", f"{share:g} is not allowed; use a number above 0 and below 1")
        if share is not None and number is not None:
            raise InputError("keep_experts", f"{number} does not go with remove_experts {share:g}; give one of them")
        asked = share is not None or number is not None
        fields = "merge_experts", "expert_scores", "propagate_experts", "router_kd"
        self.needs("remove_experts or keep_experts", asked, *fields)
        self.needs("remove_experts", share is not None, "expert_multiple")
        self.needs("a pass", self.expert_scores == "pass", "propagate_experts")
        if self.merge_experts and self.expert_scores == "weights":
            raise InputError("merge_experts", "does not go with expert_scores weights, which need no tokens")
        return self

    @property
    def removal(self) -> ExpertRemoval | None:
        """The removal of experts, which a plan takes for one that calibration text decides; None where weights become
        zero."""
        if self.remove_experts is None and self.keep_experts is None:
            return None
        score, amounts = ExpertFields.model_fields["score"].default, (self.remove_experts, self.keep_experts)
        return ExpertRemoval(score, *amounts, self.expert_multiple, True, self.merge_experts)


class PlanRecipe(Machine, Choices, RemovedExperts, ZeroingFields):
    """The recipe of `shardprune plan`.

    Recipes of `shardprune prune` are accepted; fields that a plan does not depend on are ignored. Mask rebuilding is
    not planned, and refused. With `remove_experts` or `keep_experts` it is the run of `shardprune experts` with these
    machines, text and layout.
    """

    ignored: ClassVar[frozenset[str]] = frozenset(PruneRecipe.model_fields) - {*Choices.model_fields}
    unlisted: ClassVar[tuple[str, ...]] = (OptionalBarberFields.title,)

    model: str = Field(min_length=1, description="config.json, or checkpoint directory, URL or hub name")

    @model_validator(mode="before")
    @classmethod
    def _what_only_a_run_needs(cls, values: Any) -> Any:
        """Leave out fields of a run's recipe that a plan does not depend on."""
        if not isinstance(values, dict):
            return values
        kept = {name: value for name, value in values.items() if name in cls.model_fields or name not in cls.ignored}
        fewer = any(kept.get(name) is not None for name in ("remove_experts", "keep_experts"))
        if fewer and kept.get("sparsity") is not None:
            raise InputError("sparsity", f"{kept['sparsity']} {NOTHING_IS_ZEROED}")
        fixed = re.fullmatch(r"\d+:\d+", str(kept.get("pattern")))
        said = fixed or any(kept.get(name) is not None for name in ("sparsity", "structured"))
        return kept if said else {**kept, "sparsity": ANY_SPARSITY}

    @model_validator(mode="after")
    def _is_planned(self) -> "PlanRecipe":
        if self.rebuilding is not None:
            raise InputError("rebuild", f"{self.rebuild!r} is not planned; plan the run without it")
        if self.removal is None:
            return self
        zeroing = (*QualityFields.model_fields, *PruningFields.model_fields, *ImprovingFields.model_fields)
        for field in (*zeroing, "segments", "expert_chunks"):
            value = getattr(self, field)
            if field not in ("sparsity", "reconstruct") and value != type(self).model_fields[field].default:
                raise InputError(field, f"{value!r} {NOTHING_IS_ZEROED}")
        if self.router_kd or self.reconstruct:
            check_samples(self.samples, "router_kd" if self.router_kd else "reconstruct")
        self.needs("a pass: expert_scores are there already", self.reads_text, "calibration")
        if self.propagation == "parallel":
            raise InputError("propagation", "'parallel' does not go with experts that are removed; leave it out")
        return self

    @property
    def reads_text(self) -> bool:
        """Whether the run reads calibration text."""
        return self.removal is None or self.expert_scores == "pass" or self.router_kd + self.reconstruct > 0

    def record(self) -> dict[str, Any]:
        """All fields as plain values, which make the same recipe again."""
        return super().record() | ({"sparsity": None} if self.removal else {})
