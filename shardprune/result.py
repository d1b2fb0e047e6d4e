"""What a run achieved: `result.json`, the contract between the commands and with everybody's scripts."""

from typing import Any

from pydantic import BaseModel


class ModelSize(BaseModel):
    parameters_before: int
    parameters_after: int


class ProjectionResult(BaseModel):
    """`target` and `achieved` are fractions of zeros, `error` is ||XW - XW'||^2 / ||XW||^2."""

    layer: int
    name: str
    target: float
    achieved: float
    retries: int = 0
    damping: float | None = None
    error: float | None = None


class Sparsity(BaseModel):
    """Fractions of zeros over the projections of all decoder layers; `achieved` is counted on the tensors
    written, `before` on those of the dense model."""

    target: float
    before: float
    achieved: float
    projections: list[ProjectionResult]


class Perplexity(BaseModel):
    """`after` is missing while a run is under way."""

    before: float
    after: float | None = None
    seqlen: int
    windows: int
    tokens_sha256: str


class CalibrationResult(BaseModel):
    source: str
    samples: int
    seqlen: int
    tokens_sha256: str


class WorkerResult(BaseModel):
    """`layers` are the first and last of the shard; `peak_bytes` is resident memory, on a GPU allocated memory."""

    shard: int
    replica: int
    layers: tuple[int, int]
    node: str
    peak_bytes: int
    busy_seconds: float


class Result(BaseModel):
    """The content of `result.json`; `seconds` are wall-clock by phase of the attempt that finished."""

    version: int = 1
    command: str
    fingerprint: str
    recipe: dict[str, Any]
    model: ModelSize
    calibration: CalibrationResult
    sparsity: Sparsity
    perplexity: dict[str, Perplexity]
    seconds: dict[str, float]
    workers: list[WorkerResult]
    restarts: int

    def as_json(self) -> dict[str, Any]:
        return self.model_dump(mode="json", exclude_none=True)
