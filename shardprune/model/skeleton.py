"""A model's frame (embedding, final norm, head) and its decoder layers one at a time.

The frame is the model that transformers builds from the config, with parameters on the meta device and without decoder
layers. Its own forward pass, run with stand-ins for the layers, gives the hidden states that enter the first layer, the
arguments of each layer (mask, rotary embeddings: they can differ between layers), and the logits of given hidden
states. Embedding scales, learned positions, sliding windows and soft-capped logits are therefore the model's own code,
and no family needs a driver.
"""

import copy
import math
from collections.abc import Iterable
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from shardprune.errors import InputError
from shardprune.model.checkpoint import Checkpoint
from shardprune.model.config_file import deferred_warnings, in_one_line
from shardprune.model.families import family_of
from shardprune.model.kept_keys import KeptKeys

SHAPES = 8  # wave shapes whose layer arguments are cached: masks take memory


class Recorder(nn.Module):
    """A stand-in for a decoder layer that records the hidden states and the arguments of its last call."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden: Tensor | None = None
        self.arguments: dict[str, Any] = {}

    def forward(self, hidden: Tensor, **arguments: Any) -> Tensor:
        self.hidden, self.arguments = hidden, arguments
        return hidden


class Injector(nn.Module):
    """A stand-in for all decoder layers that returns given hidden states instead of its input."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.hidden = hidden

    def forward(self, hidden: Tensor, **arguments: Any) -> Tensor:
        return self.hidden


class Skeleton:
    """The frame of a checkpoint's model, and meta-device templates of its decoder layers.

    Args:
        device: of materialised parameters.
        dtype: of the computation; None: the config's.

    Raises:
        InputError: the model's family is not supported, its weights are quantised, or transformers builds no model from
            its config.
    """

    def __init__(self, config: PretrainedConfig, device: torch.device | str, dtype: torch.dtype | None = None) -> None:
        self.family = family_of(config.model_type)
        self.config = config
        self.device = torch.device(device)
        self.dtype = dtype or config.dtype or torch.float32
        if getattr(config, "quantization_config", None):
            raise InputError("model", "its weights are quantised; give the checkpoint that they were made from")
        self.model = empty_model(config, self.dtype, self.device)
        self.model.eval().requires_grad_(False)
        parent_path, _, self._list_name = self.family.layers.rpartition(".")
        self._parent = self.model.get_submodule(parent_path)
        self._blanks: nn.ModuleList = getattr(self._parent, self._list_name)
        self._place(nn.ModuleList())
        self._arguments: dict[tuple[int, int], list[dict[str, Any]]] = {}

    @property
    def layers(self) -> int:
        return len(self._blanks)

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Return the checkpoint names and shapes of all parameters; tied ones count once."""
        tensors = {name: tuple(p.shape) for name, p in self.model.named_parameters()}
        for index in range(self.layers):
            tensors |= self.layer_tensors(index)
        return tensors

    def parameters(self) -> int:
        """Return the number of parameters of the model; tied ones count once."""
        return sum(math.prod(shape) for shape in self.tensors().values())

    # -- layers ---------------------------------------------------------------------------------------

    def layer_tensors(self, index: int) -> dict[str, tuple[int, ...]]:
        """Return the checkpoint names and shapes of one decoder layer's parameters."""
        prefix = f"{self.family.layers}.{index}."
        return {prefix + name: tuple(p.shape) for name, p in self._blanks[index].named_parameters()}

    def projection_tensor(self, index: int, projection: str) -> str:
        """Return the checkpoint name of a projection's weight."""
        return f"{self.family.layers}.{index}.{projection}.weight"

    def projection_shapes(self, index: int) -> dict[str, tuple[int, int]]:
        """Return [rows, cols] of one layer's projections, in the order of the forward pass."""
        layer = self._blanks[index]
        weights = {name: projection_weight(layer, name) for name in self.family.projections}
        return {name: (weight.shape[0], weight.shape[1]) for name, weight in weights.items()}

    def build_layer(self, index: int, tensors: Iterable[tuple[str, Tensor]]) -> nn.Module:
        """Build a decoder layer on the device from the given checkpoint tensors.

        They are converted one by one as they arrive. Parameters own their memory, so that solvers may write into them.
        """
        layer = copy.deepcopy(self._blanks[index])
        prefix = f"{self.family.layers}.{index}."
        for name, tensor in tensors:
            path, _, leaf = name.removeprefix(prefix).rpartition(".")
            parameter = nn.Parameter(tensor.to(self.device, self.dtype), requires_grad=False)
            layer.get_submodule(path)._parameters[leaf] = parameter
        return layer

    def layer_arguments(self, index: int, batch: int, seqlen: int) -> dict[str, Any]:
        """Return the keyword arguments of layer `index` for a wave [batch, seqlen] of full-length sequences."""
        key = (batch, seqlen)
        arguments = self._arguments.pop(key, None)
        if arguments is None:
            recorders = [Recorder() for _ in range(self.layers)]
            self._run(nn.ModuleList(recorders), self.model.base_model, batch, seqlen)
            arguments = [recorder.arguments for recorder in recorders]
        self._arguments[key] = arguments  # last in order: the least recently used entry is dropped first
        while len(self._arguments) > SHAPES:
            del self._arguments[next(iter(self._arguments))]
        return arguments[index]

    def next_arguments(self, batch: int, kept: KeptKeys) -> list[dict[str, Any]]:
        """Return the keyword arguments of all layers for the next token of `batch` sequences, whose keys and values
        they add to those that are kept."""
        recorders = [Recorder() for _ in range(self.layers)]
        self._run(nn.ModuleList(recorders), self.model.base_model, batch, 1, kept)
        return [recorder.arguments for recorder in recorders]

    @staticmethod
    def forward_layer(layer: nn.Module, hidden: Tensor, arguments: dict[str, Any]) -> Tensor:
        """Apply one decoder layer to hidden states [batch, seqlen, hidden]."""
        output = layer(hidden, **arguments)
        return output[0] if isinstance(output, tuple) else output

    # -- the frame --------------------------------------------------------------------------------------

    def load_frame(self, checkpoint: Checkpoint, embedding: bool = False, head: bool = False) -> None:
        """Materialise the small parts of the frame (norms, learned positions), and on request the input embedding and
        the output head, which are one tensor if the model ties them.
        """
        inputs, outputs = self.model.get_input_embeddings().weight, self.model.get_output_embeddings().weight
        skipped = set()
        if not embedding and not (head and inputs is outputs):
            skipped.add(id(inputs))
        if not head and not (embedding and inputs is outputs):
            skipped.add(id(outputs))
        read = [name for name, p in self.model.named_parameters() if id(p) not in skipped and p.is_meta]
        for name in read:
            self._materialise(self.model.get_parameter(name), checkpoint.read(name))
        if read:
            checkpoint.check_unchanged(read)

    def drop_embeddings(self) -> None:
        """Free the memory of the input embedding and the output head."""
        for module in (self.model.get_input_embeddings(), self.model.get_output_embeddings()):
            for parameter in module.parameters():
                if not parameter.is_meta:
                    self._replace(parameter, torch.empty_like(parameter, device="meta"))

    def embed(self, tokens: Tensor, kept: KeptKeys | None = None) -> Tensor:
        """Compute the hidden states [batch, seqlen, hidden] that enter the first layer from tokens [batch, seqlen].

        Args:
            kept: of the tokens before these, where there are any.
        """
        recorder = Recorder()
        self._place(nn.ModuleList([recorder]))
        self.model.base_model(input_ids=tokens.to(self.device), past_key_values=kept, use_cache=kept is not None)
        self._place(nn.ModuleList())
        assert recorder.hidden is not None
        return recorder.hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """Compute the logits [batch, seqlen, vocabulary] from the last layer's output [batch, seqlen, hidden]."""
        output = self._run(nn.ModuleList([Injector(hidden)]), self.model, *hidden.shape[:2])
        return output.logits

    # -- inside -------------------------------------------------------------------------------------------

    def _run(
        self, stand_ins: nn.ModuleList, model: nn.Module, batch: int, seqlen: int, kept: KeptKeys | None = None
    ) -> Any:
        """Run a model's forward pass with stand-ins for its layers, on an embedding of zeros."""
        width = self.model.get_input_embeddings().embedding_dim
        blank = torch.zeros(batch, seqlen, width, dtype=self.dtype, device=self.device)
        self._place(stand_ins)
        try:
            return model(inputs_embeds=blank, past_key_values=kept, use_cache=kept is not None)
        finally:
            self._place(nn.ModuleList())

    def _place(self, layers: nn.ModuleList) -> None:
        setattr(self._parent, self._list_name, layers)

    def _materialise(self, parameter: nn.Parameter, tensor: Tensor) -> None:
        self._replace(parameter, tensor.to(self.device, self.dtype))

    def _replace(self, parameter: nn.Parameter, tensor: Tensor) -> None:
        """Replace a parameter wherever it is registered: a tied one is in two modules."""
        new = nn.Parameter(tensor, requires_grad=False)
        for module in self.model.modules():
            for name, value in module._parameters.items():
                if value is parameter:
                    module._parameters[name] = new


def empty_model(config: PretrainedConfig, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """Build the causal language model of a config with parameters on the meta device and buffers on `device`.

    Raises:
        InputError: transformers builds no model from the config.
    """
    try:
        with init_empty_weights(include_buffers=False), no_init_weights(), deferred_warnings():
            model = AutoModelForCausalLM.from_config(
                config, dtype=dtype, attn_implementation=attention_of(config), trust_remote_code=False
            )
    except Exception as error:  # a bad config fails anywhere in the model's code, with any error
        raise InputError("model", f"its config.json makes no model: {in_one_line(error)}") from error
    model.tie_weights()  # not inside the context, which gives every assignment a parameter of its own
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(device)
    return model


def projection_weight(layer: nn.Module, projection: str) -> Tensor:
    """Return the weight [rows, cols] of one of a decoder layer's projections."""
    return layer.get_parameter(f"{projection}.weight")


def attention_of(config: PretrainedConfig) -> str:
    """Return the attention implementation of all runs of a model: rounding differs between implementations.

    It is `sdpa`, but `eager` if the model class has no sdpa or caps attention scores (Gemma 2): sdpa has no such term,
    and some versions of transformers drop it silently.
    """
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    capped = getattr(config, "attn_logit_softcapping", None) is not None
    return "sdpa" if model_class._supports_sdpa and not capped else "eager"
