"""The schema of `result.json`: the result of a run, for later commands, reports and users' scripts."""

import math
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, Field

from shardprune.report.experts_result import Experts
from shardprune.storage.folder import Folder
from shardprune.storage.json_file import MaybeMeasurement, Measurement, fitting
from shardprune.storage.malformed import Malformed
from shardprune.storage.manifest import FileRecord
from shardprune.storage.output_names import RESULT
from shardprune.storage.records import ProjectionReport

Count = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(gt=0)]


def _asked(recipe: dict[str, Any]) -> dict[str, Any]:
    """Check the fields of a recipe that readers of a result rely on; the others are whatever a command has."""
    kinds: dict[str, type | tuple[type, ...]] = {"model": str, "sparse": str, "out": str, "allocation": str}
    kinds |= {"method": str, "criterion": str, "remove": (int, float)}
    if not isinstance(recipe.get("model"), str):
        raise ValueError("use a recipe that names a model")
    for name, kind in kinds.items():
        if recipe.get(name) is not None and not isinstance(recipe[name], kind):
            raise ValueError(f"use a recipe as a command has recorded it: {name} is of another type")
    return recipe


def _phases(seconds: dict[str, float]) -> dict[str, float]:
    if "total" not in seconds:
        raise ValueError("use seconds by phase, with their total")
    return seconds


Asked = Annotated[dict[str, Any], AfterValidator(_asked)]
Seconds = Annotated[dict[str, float], AfterValidator(_phases)]


class ModelSize(BaseModel):
    """Numbers of parameters; `zeros_after` of those that are left are zeros of projections, where they were counted."""

    parameters_before: Positive
    parameters_after: Positive
    zeros_after: Count | None = None

    @property
    def removed(self) -> float:
        """The fraction of the parameters that was removed."""
        return 1 - self.parameters_after / self.parameters_before


class ProjectionResult(BaseModel):
    """One projection: `target` and `achieved` are fractions of zeros, `error` is ||XW - XW'||^2 / ||XW||^2, `outliers`
    the percentage of outliers among its weights where the allocation looked at them, `pattern` its N:M, `sweep` the way
    of SparseGPT's steps over columns: `kernel` (Triton, on GPUs) or `recursion`, `iterations` those in which ALPS
    chose the zeros, `refit_steps` those of conjugate gradients on the mask, `update` the way of a masked low-rank
    update of a fine-tuning: `kernel` or `products`, `tokens` the calibration tokens that were routed to the expert that
    it is a part of."""

    layer: int
    name: str
    target: float
    achieved: float
    retries: int = 0
    damping: float | None = None
    sweep: str | None = None
    iterations: int | None = None
    refit_steps: int | None = None
    update: str | None = None
    error: float | None = None
    outliers: float | None = None
    pattern: str | None = None
    tokens: int | None = None

    @classmethod
    def of(cls, report: ProjectionReport) -> "ProjectionResult":
        """Return the fields of a report that `result.json` has."""
        return cls(**{name: getattr(report, name) for name in cls.model_fields})


class LayerResult(BaseModel):
    """Fractions of zeros over all projections of a layer, and its percentage of outliers."""

    layer: int
    target: float
    achieved: float
    outliers: float | None = None


class BlockResult(BaseModel):
    """A block whose masks were rebuilt: the pairs of weights swapped, and ||dense - sparse||^2 / ||dense||^2 of
    its output over the calibration data before and after."""

    layer: int
    block: str
    swaps: int
    error_before: float | None = None
    error_after: float | None = None


class ImprovementResult(BaseModel):
    """A step that was meant to improve a layer, by the projections that it changes, and ||output - dense output||^2 /
    ||dense output - dense input||^2 of the layer on held-out windows before and after it; it was kept where that
    fell."""

    layer: int
    step: str
    projections: list[str]
    error_before: Measurement
    error_after: Measurement
    kept: bool


class Sparsity(BaseModel):
    """Fractions of zeros over the projections of all decoder layers: `target` was asked for, `allocated` is
    the mean of what the allocation gave the projections, `achieved` is counted on the tensors written,
    `before` on those of the dense model.

    Where structures were removed, these four are over the original model's weights and count what is gone
    like zeros, and `achieved` is the sum of `removed` and `zeroed`; the entries of `layers` and `projections` are
    over what remains."""

    target: float
    allocated: float
    before: float
    achieved: float
    removed: float | None = None
    zeroed: float | None = None
    layers: list[LayerResult]
    projections: list[ProjectionResult]
    blocks: list[BlockResult] | None = None
    improvements: list[ImprovementResult] | None = None

    @property
    def left_zero(self) -> float | None:
        """The fraction of zeros among the weights that are left, where structures were removed and weights made zero;
        None otherwise."""
        if not self.projections or not self.removed or self.zeroed is None:
            return None
        return self.zeroed / (1 - self.removed)


class Shape(BaseModel):
    """Layers, and what each of them has: key/value groups (a key/value head with its query heads), query heads, and
    neurons of the MLP."""

    layers: Positive
    groups: Positive
    heads: Positive
    neurons: Positive


class NarrowedLayer(BaseModel):
    """A layer that lost structures: which groups stayed, and the relative output errors of its output projections
    (||XW - X'W'||^2 / ||XW||^2) where they were measured. `retries` are those of the solver."""

    layer: int
    groups: list[int]
    errors: dict[str, Measurement]
    retries: int = 0


class Iteration(BaseModel):
    """One iteration of a path: `step` is L (the `layer` went, by its index in the original model), G (groups and
    neurons of every layer) or g (the same for what the request left); `shape` and the share of the parameters
    `removed` are those after it; `scores` are the candidates', where these were tuned before `untuned` those without
    that; `folder` has it where it was kept."""

    iteration: int
    step: Literal["L", "G", "g"]
    layer: int | None = None
    shape: Shape
    removed: float
    scores: dict[str, Measurement] = {}
    untuned: dict[str, Measurement] | None = None
    folder: Annotated[str, Field(pattern=r"^iteration-\d+$")] | None = None


class Structure(BaseModel):
    """What was removed as a whole: `layers` are those that became narrower, `kept` the layers of the original model
    that are left where some went, `removed` the share of all parameters that is gone."""

    before: Shape
    after: Shape
    removed: float
    kept: list[int] | None = None
    layers: list[NarrowedLayer] | None = None
    path: list[Iteration] | None = None
    improvements: list[ImprovementResult] | None = None


class Perplexity(BaseModel):
    """`after` is missing while a run is under way."""

    before: Measurement
    after: MaybeMeasurement = None
    seqlen: int
    windows: int
    tokens_sha256: str


class MeasuredPerplexity(BaseModel):
    """The perplexity of one model on one source."""

    value: Measurement
    seqlen: int
    windows: int
    tokens_sha256: str


class Metric(BaseModel):
    """`stderr` is missing where the harness knows none."""

    value: Measurement
    stderr: MaybeMeasurement = None


class TaskResult(BaseModel):
    """`samples` were evaluated, each after `num_fewshot` examples; a metric that has a filter is called
    `metric,filter`. A `group` has the means over tasks that have results of their own."""

    metrics: dict[str, Metric]
    samples: int
    num_fewshot: int
    group: bool = False


class Rate(BaseModel):
    """Tokens per second over all rounds."""

    median: Measurement
    least: Measurement
    most: Measurement


class Speed(BaseModel):
    """A model (`pruned` or `dense`) that reads (`prefill`) and answers (`decode`) so many prompts at a time."""

    model: str
    batch: Positive
    prefill: Rate
    decode: Rate


class ModelWeights(BaseModel):
    """The bytes of a model's tensors as they are stored, and its parameters."""

    bytes: Count
    parameters: Positive


class Continuation(BaseModel):
    """What the pruned model writes after a prompt, greedily, and what the one beside it does (`before`)."""

    prompt: str
    before: str | None = None
    after: str


class Latency(BaseModel):
    """Tokens per second of the model in transformers (`pruned`), in turn with the one `beside` it, if there is one: the
    model that its line began with (`dense`), or any other (`beside`). `prompt` and `tokens` are those read and written
    in a round."""

    device: str
    dtype: str
    threads: Positive
    prompt: Positive
    tokens: Positive
    rounds: Positive
    beside: str | None = None
    weights: dict[str, ModelWeights]
    speeds: list[Speed]
    continuations: list[Continuation] = []


class MeasuredAnswers(BaseModel):
    """The perplexity of the answers in conversations about images: exp of the mean loss of their `tokens`. `sha256`
    tells apart what was measured."""

    value: Measurement
    conversations: Positive
    images: Count
    tokens: Positive
    length: Positive
    sha256: str


class Evaluation(BaseModel):
    """What `shardprune evaluate` measured: perplexities by source, those of answers, and tasks by name. `harness` is
    the version of lm-eval, `engine` what answered it, both when tasks were evaluated last."""

    perplexity: dict[str, MeasuredPerplexity] = {}
    answers: dict[str, MeasuredAnswers] = {}
    tasks: dict[str, TaskResult] = {}
    harness: str | None = None
    engine: str | None = None
    latency: Latency | None = None


class CalibrationResult(BaseModel):
    """The calibration windows: of the `samples` some were `held_out`, to judge steps that improve a layer."""

    source: str
    samples: int
    held_out: int | None = None
    seqlen: int
    tokens_sha256: str


class WorkerResult(BaseModel):
    """`layers` are the first and last of the shard, if it has any; `peak_bytes` is resident memory, on a GPU allocated
    memory; `exchange` is the process group that tensors went through, `nccl` or `gloo`, None without one."""

    shard: int
    replica: int
    layers: tuple[int, int] | None = None
    node: str
    peak_bytes: int
    busy_seconds: float
    exchange: str | None = None


class TrainingLoss(BaseModel):
    """After a step of a fine-tuning: the mean loss of its tokens as the weights were before the step, and that of the
    held-out rows after it, where it was measured."""

    step: int
    loss: float
    learning_rate: float
    held_out: MaybeMeasurement = None


class Recovery(BaseModel):
    """What a fine-tuning did. `rows` were learned from, `targets` counts the tokens whose predictions were, `zeros` are
    those of the projections: `kept` stand where there was one before. `best_step` is the step whose weights were
    written where those with the lowest held-out loss were asked for."""

    steps: int
    best_step: int | None = None
    rows: int
    held_out_rows: int
    targets: int
    parameters_trained: int
    workers: int
    zeros_before: int
    zeros_after: int
    zeros_kept: int
    losses: list[TrainingLoss]


class Throughput(BaseModel):
    """The speed of a fine-tuning, over all of its steps: `tokens_per_second` of the steps themselves, padding not
    included, `seconds` by part, and `utilisation`, the share of the GPUs' rate of products that the model's operations
    are, without those that are computed anew; None where no rate is known."""

    tokens: int
    tokens_per_second: float
    seconds: Seconds
    utilisation: MaybeMeasurement = None


class Result(BaseModel):
    """The content of `result.json`; `seconds` are wall-clock by phase of the attempt that finished, `files` those that
    make the model, by their names in the output."""

    version: int = 1
    command: str
    fingerprint: str
    recipe: Asked
    model: ModelSize
    calibration: CalibrationResult | None = None
    sparsity: Sparsity | None = None
    structure: Structure | None = None
    experts: Experts | None = None
    recovery: Recovery | None = None
    throughput: Throughput | None = None
    perplexity: dict[str, Perplexity]
    evaluation: Evaluation | None = None
    seconds: Seconds
    workers: list[WorkerResult]
    restarts: int
    files: dict[str, FileRecord] = {}

    @property
    def improvements(self) -> list[ImprovementResult]:
        """The steps that were meant to improve layers."""
        of_path = self.structure.improvements if self.structure else None
        return of_path or (self.sparsity.improvements if self.sparsity else None) or []

    def as_json(self) -> dict[str, Any]:
        return self.model_dump(mode="json", exclude_none=True)


class EvaluationResult(BaseModel):
    """What `shardprune evaluate` returns, and the content of `result.json` in a directory of its own; `fingerprint`
    is the model's."""

    version: int = 1
    command: Literal["evaluate"] = "evaluate"
    fingerprint: str
    recipe: Asked
    evaluation: Evaluation
    seconds: Seconds
    workers: list[WorkerResult]
    restarts: int

    def as_json(self) -> dict[str, Any]:
        return self.model_dump(mode="json", exclude_none=True)


def read_result(folder: Folder) -> Result | EvaluationResult:
    """Return the content of the `result.json` in a folder.

    Raises:
        Malformed: it is none that a run of this version writes; its text follows the file's name.
    """
    content = folder.read_json(RESULT)
    if not isinstance(content, dict) or "command" not in content:
        raise Malformed("is no result of a run: it names no command")
    try:
        return fitting(content, EvaluationResult) if content["command"] == "evaluate" else fitting(content, Result)
    except Malformed as error:
        raise Malformed(f"is no result of a run: it {error}") from error


def not_finite(result: Result | EvaluationResult) -> list[str]:
    """Return the places of the numbers in a result that are not finite, which are null in its file."""
    return [*_not_finite(result.model_dump())]


def _not_finite(value: Any, place: tuple[str, ...] = ()) -> Iterator[str]:
    if isinstance(value, dict | list):
        for name, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _not_finite(item, (*place, str(name)))
    elif isinstance(value, float) and not math.isfinite(value):
        yield ".".join(place)
