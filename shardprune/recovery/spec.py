"""What the processes of a training are told when they start."""

from dataclasses import dataclass
from typing import Any

from shardprune.recipes.recover import RecoverRecipe

ROWS = "rows.safetensors"  # in the training's directory: what is learned from
HELD_OUT = "held-out.safetensors"  # and what is not


@dataclass(frozen=True)
class TrainingSpec:
    """All that a process must know, as plain values that travel.

    Args:
        recipe: with every choice made.
        config: DeepSpeed's.
        targets: paths of the linear maps that are trained, or whose zeros stay.
        steps: of the training in all.
    """

    recipe: RecoverRecipe
    fingerprint: str
    config: dict[str, Any]
    targets: tuple[str, ...]
    steps: int
