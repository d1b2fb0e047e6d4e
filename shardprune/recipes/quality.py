"""The dial between time and quality: a few settings, each of which stands for fields of a recipe."""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, ModelWrapValidatorHandler, model_validator

from shardprune.recipes.improving import TrainingFields
from shardprune.recipes.settings import Settings
from shardprune.solvers.allocation.budget import HIGHEST

# docs/quality.md has what each of them gives, docs/planning.md what it costs.
EVERYWHERE: dict[str, dict[str, Any]] = {
    "fast": {},
    "balanced": {"reconstruct": 50},
    "best": {"method": "alps", "damping": 0.1, "reconstruct": 100},
}
# Beside that, where zeros may stand anywhere and are so many that it matters which projection gives up how much.
UNSTRUCTURED: dict[str, dict[str, Any]] = {"best": {"allocation": "fisher"}}
SHARED_OUT_FROM = 0.5  # of the weights that structures leave


def stands_for(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields that the quality of a recipe stands for, where they have an effect; those among `values` that
    are given win over them."""
    quality, sparsity = values.get("quality", "fast"), values.get("sparsity")
    if not isinstance(quality, str):  # which the field's own check names
        return {}
    unstructured = values.get("pattern", "unstructured") == "unstructured"
    fields = dict(EVERYWHERE.get(quality, {}))
    if values.get("method", fields.get("method")) != fields.get("method"):
        fields.pop("damping", None)  # which was measured with the quality's own method
    if unstructured and sparsity is None:  # nothing becomes zero, but structures may go
        return {name: value for name, value in fields.items() if name in TrainingFields.model_fields}
    if unstructured and values.get("allocation_file") is None and _many(sparsity, values.get("structured")):
        fields |= UNSTRUCTURED.get(quality, {})
    return fields


def _many(sparsity: Any, structured: Any) -> bool:
    try:
        removed = float(structured or 0)
        zeroed = round((float(sparsity) - removed) / (1 - removed), 9)  # 0.5, not a bit less, of 0.7 after 0.4
        return SHARED_OUT_FROM <= zeroed < HIGHEST
    except (ArithmeticError, TypeError, ValueError):  # which the fields' own checks name
        return False


class QualityFields(Settings):
    """The dial, which fills in fields that are not given."""

    title: ClassVar[str] = "Pruning"

    quality: Literal["fast", "balanced", "best"] = Field(
        "fast", description="Time for quality: stands for fields that are not given themselves, which result.json has"
    )

    @model_validator(mode="wrap")
    @classmethod
    def _sets_what_is_given_alone(cls, values: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        made = handler(values)
        if isinstance(values, dict):
            made.model_fields_set.intersection_update(values)
        return made

    @model_validator(mode="before")
    @classmethod
    def _stands_for_fields(cls, values: Any) -> Any:
        return {**stands_for(values), **values} if isinstance(values, dict) else values

    @property
    def chosen(self) -> dict[str, Any]:
        """The fields that the quality may stand for, with the values that they have."""
        names = {name for table in (EVERYWHERE, UNSTRUCTURED) for fields in table.values() for name in fields}
        return {name: getattr(self, name) for name in sorted(names) if hasattr(self, name)}
