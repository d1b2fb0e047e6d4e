"""One recipe says everything a run does: a YAML file, overridden by the command line's options."""

import difflib
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from shardprune.errors import InputError, without_credentials
from shardprune.solvers.pattern import Pattern, parse_pattern
from shardprune.sources import FORMS, check_source

MethodName = Literal["magnitude", "wanda", "sparsegpt"]
AllocationName = Literal["uniform"]
WAVE_TOKENS = 4096  # tokens of a wave unless the recipe says otherwise


def positive(default: int | None, description: str) -> Any:
    """A field for a whole number of at least one."""
    return Field(default, ge=1, description=description)


class Settings(BaseModel):
    """What every group of settings has in common: unknown fields are errors, values never change."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Pruning(Settings):
    """What to prune"""

    method: MethodName = Field("sparsegpt", description="How the zeros are chosen and the rest corrected")
    sparsity: float | None = Field(None, description="Fraction of zeros, from 0 to below 1; not needed with N:M")
    pattern: str = Field("unstructured", description="unstructured, or N:M (at most N nonzeros in every M inputs)")
    allocation: AllocationName = Field("uniform", description="Which projection gets which sparsity")
    measure_error: bool = Field(
        True, description="Report each projection's output error; costs magnitude and wanda a Gram matrix per input"
    )

    @field_validator("sparsity")
    @classmethod
    def _sparsity_in_range(cls, value: float | None) -> float | None:
        if value is not None and not 0 <= value < 1:
            raise ValueError("use a number from 0 to below 1")
        return value

    @field_validator("pattern")
    @classmethod
    def _pattern_parses(cls, value: str) -> str:
        parse_pattern(value)
        return value

    @property
    def zeros(self) -> Pattern:
        """Where zeros may stand."""
        return parse_pattern(self.pattern)

    @property
    def target(self) -> float:
        """The fraction of the projections' weights that become zero."""
        fixed = self.zeros.sparsity
        if fixed is not None:
            return fixed
        assert self.sparsity is not None
        return self.sparsity

    @model_validator(mode="after")
    def _sparsity_fits_pattern(self) -> "Pruning":
        fixed = self.zeros.sparsity
        if fixed is None and self.sparsity is None:
            raise InputError("sparsity", "missing; give a number from 0 to below 1, or a pattern such as 2:4")
        if fixed is not None and self.sparsity is not None and abs(self.sparsity - fixed) > 1e-9:
            raise InputError("sparsity", f"{self.sparsity} does not fit the pattern {self.pattern}, which is {fixed:g}")
        return self


class Calibration(Settings):
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
        return self.wave or max(1, WAVE_TOKENS // self.seqlen)


class Evaluation(Settings):
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


class Cluster(Settings):
    """Workers"""

    backend: Literal["ray", "local"] = Field("ray", description="Ray actors, or this process alone")
    address: str | None = Field(
        None, description="Ray cluster to use (default: RAY_ADDRESS, else one of this machine's own)"
    )
    shards: int | None = positive(None, "Contiguous runs of layers (default: exact 1, parallel one per slot)")
    replicas: int | None = positive(None, "Workers per shard, sharing the samples (default: the GPUs left over)")
    propagation: Literal["exact", "parallel"] = Field("exact", description="Shard after shard, or all at once")
    segments: int | None = positive(
        None, "Runs of layers that parallel propagation prunes independently (default: one per shard)"
    )
    weights: Literal["resident", "streamed"] = Field(
        "resident", description="Keep a shard's layers, or read each when its turn comes"
    )
    activations: Literal["auto", "device", "host"] = Field("auto", description="Where the waves are kept")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="What the workers compute on")
    dtype: Literal["auto", "float32"] = Field(
        "auto", description="What they compute in; auto is the stored dtype on GPUs, float32 on CPUs"
    )
    threads: int | None = positive(None, "CPU threads of a worker (default: cores divided by workers)")
    max_restarts: int = Field(3, ge=0, description="How often lost workers are replaced")


class Run(Settings):
    """Run"""

    out: str = Field(min_length=1, description="Directory or URL of the result; empty, or this run's own")
    resume: bool = Field(True, description="Go on where the same run was cut off")


class Recipe(Pruning, Calibration, Evaluation, Cluster, Run):
    """Everything that `shardprune prune` does."""

    model: str = Field(min_length=1, description="Directory, URL or hub name of the checkpoint")

    def record(self) -> dict[str, Any]:
        """All fields as plain values, for files that others read: URLs without credentials."""
        return {name: _without_credentials(value) for name, value in self.model_dump(mode="json").items()}

    @classmethod
    def load(cls, file: str | Path | None, overrides: dict[str, Any]) -> "Recipe":
        """A recipe from a YAML file, its fields overridden by those given.

        Raises:
            InputError: the file or a field is wrong.
        """
        return cls.checked({**(_read_yaml(file) if file else {}), **overrides})

    @classmethod
    def checked(cls, values: dict[str, Any]) -> "Recipe":
        """A recipe from plain values.

        Raises:
            InputError: names the first field that is wrong, its value and what is allowed.
        """
        try:
            return cls(**values)
        except ValidationError as error:
            raise _input_error(error) from error


def _read_yaml(file: str | Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(Path(file).read_text())
    except OSError as error:
        raise InputError("recipe", f"{str(file)!r} cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError("recipe", f"{str(file)!r} is not YAML: {str(error).splitlines()[0]}") from error
    if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
        raise InputError("recipe", f"{str(file)!r} must hold fields and values")
    return values


def _without_credentials(value: Any) -> Any:
    if isinstance(value, list):
        return [_without_credentials(item) for item in value]
    return without_credentials(value) if isinstance(value, str) else value


def _input_error(error: ValidationError) -> InputError:
    """The first problem of a validation as one line."""
    first = error.errors()[0]
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, InputError):
        return cause
    field = str(first["loc"][0])
    if first["type"] == "missing":
        return InputError(field, "missing")
    if first["type"] == "extra_forbidden":
        near = difflib.get_close_matches(field, Recipe.model_fields, n=1)
        known = f"did you mean {near[0]}?" if near else f"use one of {', '.join(sorted(Recipe.model_fields))}"
        return InputError(field, f"no field of a recipe has this name; {known}")
    if first["type"] == "literal_error":
        return InputError(field, f"{first['input']!r} is not allowed; use one of {', '.join(choices(field))}")
    reason = str(cause) if cause else first["msg"].replace("Input should be", "use")
    return InputError(field, f"{first['input']!r} is not allowed; {reason}")


def choices(field: str) -> list[str]:
    """The values that a field of fixed choices takes; none for other fields."""
    annotation = Recipe.model_fields[field].annotation
    return [str(choice) for choice in get_args(annotation)] if get_origin(annotation) is Literal else []
