"""The choice of what a fine-tuning trains: all weights, or low-rank updates of some."""

import warnings
from collections.abc import Iterator, Sequence
from typing import Protocol

from transformers import PreTrainedModel

from shardprune.recovery.experts import own_weights, train_together
from shardprune.recovery.lowrank import LowRankLinear, add_updates
from shardprune.recovery.masks import freeze_zeros


class Learning(Protocol):
    """The settings of a fine-tuning that decide what is trained, and how activations are kept."""

    @property
    def full(self) -> bool: ...
    @property
    def keep_sparsity(self) -> bool: ...
    @property
    def lora_rank(self) -> int: ...
    @property
    def lora_alpha(self) -> float: ...
    @property
    def dropout(self) -> float: ...
    @property
    def seed(self) -> int: ...
    @property
    def zero(self) -> int: ...
    @property
    def recompute(self) -> bool: ...


def choose_trained(model: PreTrainedModel, recipe: Learning, targets: Sequence[str]) -> Iterator[LowRankLinear]:
    """Let the chosen parameters of a model without any require gradients; yield the updates as they are added.

    Args:
        targets: paths of the linear maps that are updated, or whose zeros are kept.
    """
    if recipe.full:
        own_weights(model)
        model.requires_grad_(True)
        for path in targets if recipe.keep_sparsity else ():
            freeze_zeros(model.get_parameter(f"{path}.weight"))
    else:
        options = recipe.lora_rank, recipe.lora_alpha, recipe.dropout, recipe.keep_sparsity, recipe.seed
        yield from add_updates(model, targets, *options)
    train_together(model)
    if recipe.recompute:
        # Under ZeRO-3 the recomputed forward may see weights gathered that were partitioned in the first one; only
        # reentrant checkpointing tolerates that. It needs an input that requires gradients.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of another name for it, which older versions do not have
            model.gradient_checkpointing_enable({"use_reentrant": recipe.zero == 3})
        model.enable_input_require_grads()
