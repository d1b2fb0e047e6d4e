"""Causal language models as a training uses them: they predict at chosen places and return a loss, or logits."""

from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from shardprune.recovery.distillation import Distillation
from shardprune.recovery.loss import LossHead
from shardprune.recovery.predictions import PredictionBatch


class Student(nn.Module):
    """A model that returns the summed loss of its predictions. Its head is replaced by a `LossHead`."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model
        head = model.get_output_embeddings()
        assert isinstance(head, nn.Linear)
        model.set_output_embeddings(LossHead(head, cap_of(model.config)))

    def forward(self, batch: PredictionBatch, distillation: Distillation | None = None) -> Tensor:
        head = self.model.get_output_embeddings()
        return head(last_hidden_states(self.model, batch), batch.targets, distillation)


class Teacher(nn.Module):
    """A model that returns the logits [predictions, vocabulary] of its predictions, before their cap."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: PredictionBatch) -> Tensor:
        return self.model.get_output_embeddings()(last_hidden_states(self.model, batch))


def last_hidden_states(model: PreTrainedModel, batch: PredictionBatch) -> Tensor:
    """Return the last hidden states where a model predicts, [predictions, width]."""
    # With a cache, transformers does not detect packed rows by their positions.
    output = model.base_model(**batch.inputs, use_cache=False)
    # Indices, because a mask of the places would make the host wait for their number.
    return output.last_hidden_state.flatten(0, 1).index_select(0, batch.places)


def cap_of(config: PretrainedConfig) -> float | None:
    """Return the cap of a model's logits, if it has one."""
    return getattr(config, "final_logit_softcapping", None)
