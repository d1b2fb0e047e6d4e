"""The fields of the steps that improve a layer beyond its pruning method."""

from typing import ClassVar, Literal

from pydantic import Field

from shardprune.errors import InputError
from shardprune.recipes.settings import Settings
from shardprune.solvers.improving import LEAST_SAMPLES, Improving
from shardprune.solvers.rebuilding import Rebuilding


class TrainingFields(Settings):
    """Training of every layer."""

    title: ClassVar[str] = "Improvement"

    reconstruct: int = Field(
        0, ge=0, description="Steps of training each layer's kept weights towards the dense output; 0: none"
    )


class ImprovingFields(TrainingFields):
    """Steps that improve a layer; each is kept only where held-out windows say that it does."""

    title: ClassVar[str] = "Improvement"

    targets: Literal["auto", "stream", "own"] = Field(
        "auto",
        description="Targets of the projections: the dense residual stream, or own outputs; auto: stream where "
        "calibration is self and nothing is trained",
    )

    @property
    def towards_stream(self) -> bool:
        """Whether projections aim at the dense residual stream."""
        return self.targets == "stream" or (self.targets == "auto" and self.stream_is_safe)

    @property
    def stream_is_safe(self) -> bool:
        """Whether `auto` aims at the dense stream: not by itself, but a recipe with calibration text may say so."""
        return False

    @property
    def decided(self) -> dict[str, str]:
        """The fields that may be `auto`, by the value that this is for the recipe."""
        return {"targets": "stream" if self.towards_stream else "own"}

    @property
    def improving(self) -> Improving:
        """The steps."""
        return Improving(self.towards_stream, self.reconstruct)

    def check_improving(self, samples: int, rebuilding: Rebuilding | None) -> None:
        """Check that windows can be held out of so many samples, and that nothing undoes the steps.

        Raises:
            InputError: there are too few, or masks are rebuilt.
        """
        if rebuilding and self.towards_stream:
            raise InputError("rebuild", "'barber' does not go with targets stream; use targets own, or rebuild none")
        if self.improving:
            check_samples(samples, "targets stream" if self.towards_stream else "reconstruct")


def check_samples(samples: int, asked: str) -> None:
    """Check that windows can be held out of so many samples.

    Args:
        asked: the steps that hold some out.

    Raises:
        InputError: there are too few.
    """
    if samples < LEAST_SAMPLES:
        raise InputError(
            "samples", f"{samples} is too few for {asked}, which holds out some; use at least {LEAST_SAMPLES}"
        )
