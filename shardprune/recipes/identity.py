"""Identity of a run that changes a model's layers: the fields of its recipe that shape the tensors."""

from typing import Any, ClassVar, Literal, Protocol

from shardprune.model.pruning_job import PruningJob
from shardprune.recipes.groups import AskedLayout, CalibrationFields
from shardprune.recipes.settings import Settings


class LayerRecipe(Protocol):
    """A recipe whose run changes a model's layers: those of `prune`, `rebuild` and `mop`.

    `shaping` are the groups of which every field shapes the tensors.
    """

    command: ClassVar[str]
    shaping: ClassVar[tuple[type[Settings], ...]]

    @property
    def model(self) -> str: ...
    @property
    def out(self) -> str: ...
    @property
    def resume(self) -> bool: ...
    @property
    def backend(self) -> str: ...
    @property
    def device(self) -> Literal["auto", "cpu", "cuda"]: ...
    @property
    def dtype(self) -> Literal["auto", "float32"]: ...
    @property
    def threads(self) -> int | None: ...
    @property
    def activations(self) -> Literal["auto", "device", "host"]: ...
    @property
    def max_restarts(self) -> int: ...
    @property
    def calibration(self) -> str: ...
    @property
    def samples(self) -> int: ...
    @property
    def seqlen(self) -> int: ...
    @property
    def seed(self) -> int: ...
    @property
    def sequences_per_wave(self) -> int: ...
    @property
    def eval(self) -> tuple[str, ...]: ...
    @property
    def eval_windows(self) -> int | None: ...
    @property
    def asked(self) -> AskedLayout: ...

    def job(self) -> PruningJob:
        """Return what is to be done to the layers."""

    def shape(self) -> dict[str, Any]:
        """Return what shapes the tensors, beside models, text and layout."""

    def record(self) -> dict[str, Any]:
        """Return all fields as plain values, URLs without credentials."""

    def model_copy(self, *, update: dict[str, Any]) -> Any:
        """Return the recipe with other values."""


def shaping_fields(recipe: LayerRecipe | type[Any]) -> set[str]:
    """Return the fields of a recipe that shape what the layer files hold, beside models and text."""
    return {name for group in recipe.shaping for name in group.model_fields} | {"measure_error"}


def identifying_fields(recipe: type[Any]) -> set[str]:
    """Return the fields of a `LayerRecipe` class that say which run it is, as far as they do not depend on machines."""
    named = {*shaping_fields(recipe), *CalibrationFields.model_fields, "model", "sparse", "propagation"}
    return named & set(recipe.model_fields)
