"""Groups of settings that several commands share."""

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    PlainSerializer,
    ValidationInfo,
    field_validator,
    model_validator,
)

from shardprune.errors import InputError
from shardprune.recipes.settings import Settings, optional
from shardprune.solvers.scoring import Score
from shardprune.storage.locations import absolute
from shardprune.storage.mixture import CALIBRATION, SELF, TRAINING, Kind, Part, parse_parts, windows_of
from shardprune.storage.sources import PAPERS, check_source

WAVE_TOKENS = 4096  # tokens of a wave unless the recipe says otherwise
BATCH = 32  # sequences of a text that a model writes which are computed together, unless the recipe says otherwise
KEPT_ELEMENTS = 6 * 10**9  # of a batch's keys and values over all layers, at most: 12 GB in 16 bits
THREADS = 1024  # most of one worker; torch crashes where the machine cannot start as many as it is told to
WORKERS = 10_000  # most beside one another, one process each


def wave_of(asked: int | None, seqlen: int) -> int:
    """Return the sequences of a wave: those asked for, or `WAVE_TOKENS` tokens' worth."""
    return asked or max(1, WAVE_TOKENS // seqlen)


def batch_of(asked: int | None, kept: int) -> int:
    """Return the sequences that are computed together when a model writes: those asked for, or as many as keep at most
    `KEPT_ELEMENTS`.

    Args:
        kept: elements of the keys and values of one sequence over all layers.
    """
    size = BATCH
    while size > 1 and size * kept > KEPT_ELEMENTS:
        size //= 2
    return asked or size


def _listed(value: Any) -> Any:
    return (value,) if isinstance(value, str) else value


def _known(value: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
    for source in value:
        check_source(str(info.field_name), source)
    return value


def _weighted(kind: Kind) -> AfterValidator:
    """Return the check of sources of a kind, each with a weight if it is followed by one."""

    def checked(value: tuple[str, ...]) -> tuple[str, ...]:
        parse_parts(value, kind)
        return value

    return AfterValidator(checked)


def _plain(value: tuple[str, ...]) -> str | list[str]:
    return value[0] if len(value) == 1 else list(value)


PLAIN = PlainSerializer(_plain, return_type=Any)
# Sources with weights, one or several as a list: of calibration text and of training data.
CalibrationMixture = Annotated[tuple[str, ...], BeforeValidator(_listed), _weighted(CALIBRATION), PLAIN]
TrainingMixture = Annotated[tuple[str, ...], BeforeValidator(_listed), _weighted(TRAINING), PLAIN]
OFFERED: list[str] = ["stdlib", *PAPERS]  # what a shell offers for a source of text, beside files
# Sources of text: one, or several as a list.
Sources = Annotated[tuple[str, ...], BeforeValidator(_listed), AfterValidator(_known)]
# Files: one, or several as a list.
Files = Annotated[tuple[Annotated[str, Field(min_length=1)], ...], BeforeValidator(_listed)]
# Globs over names: one, or several as a list.
Globs = Annotated[tuple[Annotated[str, Field(min_length=1)], ...], BeforeValidator(_listed)]


DURATION = re.compile(r"(\d+(?:\.\d+)?) ?(s|m|h|)", re.IGNORECASE)


def _duration(value: Any) -> Any:
    """A duration as it is written: a number of seconds is one."""
    text = value
    if isinstance(value, int | float) and not isinstance(value, bool):
        text = f"{value:f}".rstrip("0").rstrip(".") if isinstance(value, float) else f"{value}"
    if not isinstance(text, str) or not DURATION.fullmatch(text) or not _seconds(text) > 0:
        raise ValueError("use a time such as 10m, 90s or 2h")
    return text


def _seconds(text: str) -> float:
    match = DURATION.fullmatch(text)
    assert match
    return float(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[match[2].lower()]


Patience = Annotated[str, BeforeValidator(_duration)]


class WidthFields(Settings):
    """Removal of key/value groups and neurons."""

    title: ClassVar[str] = "Structured pruning"

    score: Score = Field("obs", description="Importance of a key/value group or neuron")
    correction: bool = Field(True, description="Least-squares correction of the remaining columns")
    neuron_multiple: Literal["auto"] | Annotated[int, Field(ge=1)] = Field(
        "auto", description="Round neurons to a multiple, auto: of 256, 128, 64 or 32 on each device, or a number"
    )
    tensor_parallel: int = Field(
        1, ge=1, le=1024, description="Devices of tensor parallelism that serve the model: groups and neurons divide"
    )


class CalibrationFields(Settings):
    """Text that a method sees."""

    title: ClassVar[str] = "Calibration"

    calibration: CalibrationMixture = Field(
        ("c4",),
        description=f"Text source: {CALIBRATION.forms}; repeatable",
        json_schema_extra={"offered": [SELF, *OFFERED]},
    )
    samples: int = Field(128, ge=1, le=1_000_000, description="Number of calibration windows")
    seqlen: int = Field(2048, ge=2, description="Tokens per window")
    seed: int = Field(0, ge=0, description="Random seed for drawing windows")
    wave: int | None = optional(f"{WAVE_TOKENS} / seqlen", "Windows per micro-batch", ge=1)
    self_temperature: float = Field(
        1.0, ge=0.001, le=100, description="Temperature of sampling (calibration self, drawn with the seed)"
    )
    self_bos: bool = Field(
        False,
        description="Begin sequences with the tokenizer's first token (calibration self): for models that need it",
    )
    self_batch: int | None = optional(
        f"{BATCH}, halved until keys and values have {KEPT_ELEMENTS // 10**9}e9 elements",
        "Sequences computed together (calibration self); another number is another text",
        ge=1,
        le=1024,
    )

    @model_validator(mode="after")
    def _self_options_have_an_effect(self) -> "CalibrationFields":
        written = any(part.is_written for part in self.parts)
        self.needs("calibration self", written, "self_temperature", "self_bos", "self_batch")
        windows_of(self.parts, self.samples)
        return self

    @property
    def parts(self) -> tuple[Part, ...]:
        """The sources of the text with their weights."""
        return parse_parts(self.calibration)

    @property
    def sequences_per_wave(self) -> int:
        """Sequences per micro-batch. It never depends on the machine: sums over a wave are rounded together, so that
        another wave size is another result."""
        return wave_of(self.wave, self.seqlen)


class PerplexityFields(Settings):
    """Perplexity before and after a run."""

    title: ClassVar[str] = "Evaluation"

    eval: Sources = Field(
        (),
        description="Perplexity source, measured before and after; repeatable",
        json_schema_extra={"offered": [*OFFERED]},
    )
    eval_windows: int | None = optional("all", "Windows per perplexity source", ge=1)


class OutputErrorFields(Settings):
    """Output errors of the projections."""

    title: ClassVar[str] = "Evaluation"

    measure_error: bool = Field(
        True, description="Measure output errors; magnitude and wanda then need a Gram matrix per input"
    )


class EvaluationFields(PerplexityFields, OutputErrorFields):
    """Measurements of a run."""


class BackendFields(Settings):
    """Backend of the workers."""

    title: ClassVar[str] = "Workers"

    backend: Literal["ray", "local"] = Field("ray", description="Ray actors or this process")
    address: str | None = optional("RAY_ADDRESS, or a new local cluster", "Address of the Ray cluster")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="Compute device")
    threads: int | None = optional("cores / workers", "CPU threads per worker", ge=1, le=THREADS)
    max_restarts: int = Field(3, ge=0, description="Restarts after lost workers")
    patience: Patience = Field(
        "10m", description="Time beyond the longest call so far after which a worker that hangs is lost"
    )

    @property
    def patience_seconds(self) -> float:
        """The patience with a worker, in seconds."""
        return _seconds(self.patience)


@dataclass(frozen=True)
class AskedLayout:
    """The layout that a recipe asks for; None where it leaves the choice to the machine. The experts of a layer are
    pruned in `chunks`."""

    shards: int | None
    replicas: int | None
    segments: int | None = None
    propagation: Literal["exact", "parallel"] = "exact"
    streamed: bool = False
    chunks: int = 1

    @property
    def workers(self) -> int:
        """The workers that are asked for."""
        return (self.shards or 1) * (self.replicas or 1)


class WorkerFields(BackendFields):
    """Shards and replicas."""

    shards: int | None = optional("exact 1, parallel GPUs", "Number of contiguous runs of layers", ge=1)
    replicas: int | None = optional("GPUs / shards", "Workers per shard, sharing the samples", ge=1, le=WORKERS)
    activations: Literal["auto", "device", "host"] = Field("auto", description="Memory for activations")
    exchange: Literal["auto", "group", "store"] = Field(
        "auto",
        description="Tensors between workers: process group (NCCL, gloo) or object store; auto: group on GPUs",
    )
    dtype: Literal["auto", "float32"] = Field(
        "auto",
        description="Compute dtype, float32 also of FP8 weights as read; auto: stored dtype on GPUs, float32 on CPUs",
    )

    @property
    def asked(self) -> AskedLayout:
        """The layout that is asked for."""
        return AskedLayout(self.shards, self.replicas)


class PruneWorkerFields(WorkerFields):
    """Propagation over the shards, and their weights."""

    propagation: Literal["exact", "parallel"] = Field(
        "exact", description="exact: prune shards in order; parallel: all at once from dense activations"
    )
    segments: int | None = optional("shards", "Independently pruned runs of layers (propagation parallel)", ge=1)
    weights: Literal["resident", "streamed"] = Field(
        "resident", description="resident keeps all layers in memory; streamed loads one at a time"
    )

    @property
    def asked(self) -> AskedLayout:
        return AskedLayout(self.shards, self.replicas, self.segments, self.propagation, self.weights == "streamed")


class ExpertFields(PruneWorkerFields):
    """Chunks of the experts of a layer."""

    expert_chunks: int = Field(
        1, ge=1, le=1024, description="Parts in which a layer's experts are pruned, so that their sums take less memory"
    )

    @property
    def asked(self) -> AskedLayout:
        return replace(super().asked, chunks=self.expert_chunks)


class OutputFields(Settings):
    """Output of a run."""

    title: ClassVar[str] = "Output"

    out: str = Field(min_length=1, description="Output directory or URL")
    resume: bool = Field(True, description="Resume an interrupted run with the same fingerprint")
    report: bool = Field(True, description="Write OUT/report.html")

    @property
    def decided(self) -> dict[str, str]:
        """The fields that shape the tensors and may be `auto`, by the value that this is for the recipe."""
        return {}

    @field_validator("out")
    @classmethod
    def _out_lasts(cls, value: str) -> str:
        check_survives_ray_job("out", value)
        return value


HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9_][\w.-]{0,95}")


class ModelOutputFields(OutputFields):
    """Output of a run that makes a model."""

    title: ClassVar[str] = "Output"

    push: str | None = optional("none", "Hub repository that receives the output (organisation/name)")

    @field_validator("push")
    @classmethod
    def _names_a_repository(cls, value: str | None) -> str | None:
        if value is not None and not HUB_NAME.fullmatch(value):
            raise InputError("push", f"{value!r} is no name of a hub repository; use organisation/name")
        return value


COPIES = ("runtime_resources", "working_dir_files")  # where Ray unpacks what jobs are submitted with


def check_survives_ray_job(field: str, url: str) -> None:
    """Check that what is written at a path or URL is still there after the job.

    Raises:
        InputError: it would lie in a copy of the working directory.
    """
    parts = Path(absolute(url)).parts
    if any(parts[at : at + len(COPIES)] == COPIES for at in range(len(parts))):
        raise InputError(
            field, f"{url!r} would be lost with this job's copy of the working directory; use an absolute path or a URL"
        )
