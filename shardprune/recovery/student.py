"""Causal language models as a training uses them: they predict at chosen places and return a loss, or logits."""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from shardprune.model.head_logits import head_logits
from shardprune.recovery.distillation import Distillation
from shardprune.recovery.loss import LossHead
from shardprune.recovery.predictions import PredictionBatch


class Student(nn.Module):
    """A model that returns the summed loss of its predictions. Its head is replaced by a `LossHead`.

    Args:
        seeing: the multimodal model without its head that the model is the language model of; None without one.

    Raises:
        InputError: the model makes more of its head's outputs than a scale and a cap.
    """

    def __init__(self, model: PreTrainedModel, seeing: PreTrainedModel | None = None) -> None:
        super().__init__()
        self.model = model
        self._body = _body_of(model, seeing)
        head = model.get_output_embeddings()
        assert isinstance(head, nn.Linear)
        model.set_output_embeddings(LossHead(head, head_logits(model.config)))

    def forward(self, batch: PredictionBatch, distillation: Distillation | None = None) -> Tensor:
        head = self.model.get_output_embeddings()
        return head(last_hidden_states(self._body, batch), batch.targets, distillation)


class Teacher(nn.Module):
    """A model that returns its head's outputs [predictions, vocabulary] where it predicts; `seeing` is that of a
    `Student`."""

    def __init__(self, model: PreTrainedModel, seeing: PreTrainedModel | None = None) -> None:
        super().__init__()
        self.model = model
        self._body = _body_of(model, seeing)

    def forward(self, batch: PredictionBatch) -> Tensor:
        return self.model.get_output_embeddings()(last_hidden_states(self._body, batch))


Body = Callable[..., Any]  # gives the last hidden states


def _body_of(model: PreTrainedModel, seeing: PreTrainedModel | None) -> Body:
    """Return what runs a model without its head. It is no module of the caller: the vision tower is no part of what
    DeepSpeed trains and partitions."""
    return partial(seeing or model.base_model)


def last_hidden_states(body: Body, batch: PredictionBatch) -> Tensor:
    """Return the last hidden states where a model predicts, [predictions, width]."""
    # With a cache, transformers does not detect packed rows by their positions.
    output = body(**batch.inputs, use_cache=False)
    # Indices, because a mask of the places would make the host wait for their number.
    return output.last_hidden_state.flatten(0, 1).index_select(0, batch.places)
