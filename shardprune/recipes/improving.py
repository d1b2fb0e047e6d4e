"""The fields of the steps that improve a layer beyond its pruning method."""

from typing import ClassVar, Literal

from pydantic import Field

from shardprune.errors import InputError
from shardprune.recipes.settings import Settings
from shardprune.solvers.improving import LEAST_SAMPLES, Improving
from shardprune.solvers.rebuilding import Rebuilding


class ImprovingFields(Settings):
    """Steps that improve a layer; each is kept only where held-out windows say that it does."""

    title: ClassVar[str] = "Improvement"

    targets: Literal["auto", "own", "stream"] = Field(
        "auto",
        description="Targets of the projections: own outputs, or the dense residual stream; auto: own",
    )

    @property
    def towards_stream(self) -> bool:
        """Whether projections aim at the dense residual stream: the one place that says what `auto` is."""
        return self.targets == "stream"

    @property
    def decided(self) -> dict[str, str]:
        """The fields of which `auto` is a value, as they are decided."""
        return {"targets": "stream" if self.towards_stream else "own"}

    @property
    def improving(self) -> Improving:
        """The steps."""
        return Improving(stream_targets=self.towards_stream)

    def check_improving(self, samples: int, rebuilding: Rebuilding | None) -> None:
        """Check that windows can be held out of so many samples, and that nothing undoes the steps.

        Raises:
            InputError: there are too few, or masks are rebuilt.
        """
        if not self.improving:
            return
        if rebuilding:
            raise InputError("rebuild", "'barber' does not go with targets stream; use targets own, or rebuild none")
        if samples < LEAST_SAMPLES:
            raise InputError(
                "samples",
                f"{samples} is too few for targets stream, which holds out some; use at least {LEAST_SAMPLES}",
            )
