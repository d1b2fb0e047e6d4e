"""The start-up arguments of a training process."""

from dataclasses import dataclass
from typing import Any

from shardprune.recipes.recover import RecoverRecipe

ROWS = "rows.safetensors"  # in the training directory: the rows to learn from
HELD_OUT = "held-out.safetensors"  # and those to measure on


@dataclass(frozen=True)
class TrainingSpec:
    """The arguments of a training process, as plain values that can be pickled.

    Args:
        recipe: with all defaults resolved.
        config: DeepSpeed's.
        targets: paths of the linear maps that are trained, or whose zeros are kept.
        steps: in all, those done before a resume included.
    """

    recipe: RecoverRecipe
    fingerprint: str
    config: dict[str, Any]
    targets: tuple[str, ...]
    steps: int
