"""Groups of settings that several commands share."""

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator

from shardprune.errors import InputError
from shardprune.recipes.settings import Settings, positive
from shardprune.solvers.scoring import Score
from shardprune.storage.folder import absolute
from shardprune.storage.sources import FORMS, check_source

WAVE_TOKENS = 4096  # tokens of a wave unless the recipe says otherwise


def rows_per_wave(length: int) -> int:
    """Rows of `length` tokens in a wave of the default size; at least one."""
    return max(1, WAVE_TOKENS // length)


class WidthFields(Settings):
    """Key/value groups and neurons"""

    score: Score = Field(
        "obs", description="What a structure is judged by: activations, outliers, or the error that its removal leaves"
    )
    correction: bool = Field(True, description="Correct the columns that stay by least squares")
    neuron_multiple: int = positive(1, "Of what the number of neurons stays a multiple, for kernels and their shards")


class CalibrationFields(Settings):
    """Calibration"""

    calibration: str = Field("c4", description=f"Source of the text: {FORMS}")
    samples: int = positive(128, "Windows to draw from the source")
    seqlen: int = Field(2048, ge=2, description="Tokens of a window")
    seed: int = Field(0, description="Seed of the drawing")
    wave: int | None = positive(None, "Windows that move through the shards together (default: 4096 tokens' worth)")

    @field_validator("calibration")
    @classmethod
    def _known_source(cls, value: str) -> str:
        check_source("calibration", value)
        return value

    @property
    def sequences_per_wave(self) -> int:
        """How many sequences go through the shards together. It never depends on the machine: sums
        over a wave are rounded together, so that another wave size is another result."""
        return self.wave or rows_per_wave(self.seqlen)


class PerplexityFields(Settings):
    """Evaluation"""

    eval: tuple[str, ...] = Field((), description="Measure perplexity on this source before and after; repeatable")
    eval_windows: int | None = positive(None, "Use the first windows of each source only (default: all)")

    @field_validator("eval", mode="before")
    @classmethod
    def _one_source_or_several(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @field_validator("eval")
    @classmethod
    def _known_sources(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for source in value:
            check_source("eval", source)
        return value


class OutputErrorFields(Settings):
    """Evaluation"""

    measure_error: bool = Field(
        True, description="Report output errors; costs magnitude and wanda a Gram matrix per input"
    )


class EvaluationFields(PerplexityFields, OutputErrorFields):
    """Evaluation"""


class BackendFields(Settings):
    """Workers"""

    backend: Literal["ray", "local"] = Field("ray", description="Ray actors, or this process alone")
    address: str | None = Field(
        None, description="Ray cluster to use (default: RAY_ADDRESS, else one of this machine's own)"
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="What the workers compute on")
    threads: int | None = positive(None, "CPU threads of a worker (default: cores divided by workers)")
    max_restarts: int = Field(3, ge=0, description="How often lost workers are replaced")


class WorkerFields(BackendFields):
    """Workers"""

    shards: int | None = positive(None, "Contiguous runs of layers (default: exact 1, parallel one per slot)")
    replicas: int | None = positive(None, "Workers per shard, sharing the samples (default: the GPUs left over)")
    activations: Literal["auto", "device", "host"] = Field("auto", description="Where the waves are kept")
    dtype: Literal["auto", "float32"] = Field(
        "auto", description="What they compute in; auto is the stored dtype on GPUs, float32 on CPUs"
    )


class PruneWorkerFields(WorkerFields):
    """Workers"""

    propagation: Literal["exact", "parallel"] = Field("exact", description="Shard after shard, or all at once")
    segments: int | None = positive(
        None, "Runs of layers that parallel propagation prunes independently (default: one per shard)"
    )
    weights: Literal["resident", "streamed"] = Field(
        "resident", description="Keep a shard's layers, or read each when its turn comes"
    )


class OutputFields(Settings):
    """Run"""

    out: str = Field(min_length=1, description="Directory or URL of the result; empty, or this run's own")
    resume: bool = Field(True, description="Go on where the same run was cut off")
    report: bool = Field(True, description="Write OUT/report.html at the end")

    @field_validator("out")
    @classmethod
    def _out_lasts(cls, value: str) -> str:
        check_survives_ray_job("out", value)
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
