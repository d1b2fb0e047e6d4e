"""The start-up arguments of a training process."""

from dataclasses import dataclass
from typing import Any, Literal

from shardprune.model.sources import SourceState
from shardprune.recipes.recover import RecoverRecipe
from shardprune.recovery.mixing import RowMixture

ROWS = "rows.safetensors"  # in the training directory: the rows to learn from
HELD_OUT = "held-out.safetensors"  # and those to measure on


class DecidedRecipe(RecoverRecipe):
    """The recipe of a fine-tuning with every choice made; model, output and state as every process finds them."""

    device: Literal["cpu", "cuda"]
    precision: Literal["bf16", "fp32"]
    workers: int
    micro_batch: int
    threads: int
    state: str
    evaluate_every: int


@dataclass(frozen=True)
class TrainingSpec:
    """The arguments of a training process, as plain values that can be pickled.

    Args:
        config: DeepSpeed's.
        targets: paths of the linear maps that are trained, or whose zeros are kept.
        steps: in all, those done before a resume included.
        mixture: of the rows to learn from, if they come from several sources.
        inputs: the checkpoints, by the recipe's fields that name them, as the driver has opened them.
    """

    recipe: DecidedRecipe
    fingerprint: str
    config: dict[str, Any]
    targets: tuple[str, ...]
    steps: int
    inputs: dict[str, SourceState]
    mixture: RowMixture | None = None
