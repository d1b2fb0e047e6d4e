"""A model's frame (embedding, final norm, head) and its decoder layers one at a time.

The frame is the model that transformers builds from the config, with parameters on the meta device. Its own forward
pass, run with stand-ins for the layers, gives the hidden states that enter the first layer, the arguments of each layer
(mask, rotary embeddings: they can differ between layers), and the logits of given hidden states. Embedding scales,
learned positions, sliding windows and soft-capped logits are therefore the model's own code, and no family needs a
driver.
"""

import copy
import math
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from shardprune.errors import InputError
from shardprune.model.carried import OWN, frame_inputs, further_embedding
from shardprune.model.derivation import family_of_model
from shardprune.model.empty_model import dtypes_of, empty_model, persistent_buffers
from shardprune.model.experts import Part, allocate, take_apart
from shardprune.model.kept_keys import KeptKeys, going_on
from shardprune.model.left_dense import ignoring
from shardprune.model.stand_ins import Arguments, Recorder, StandIn, passing_on, returning, standing_in

SHAPES = 8  # wave shapes whose layer arguments are cached: masks take memory


class TensorSource(Protocol):
    """Stored tensors of a model, such as a checkpoint."""

    def read(self, name: str) -> Tensor: ...

    def check_unchanged(self, names: Iterable[str]) -> None: ...


class Skeleton:
    """The frame of a checkpoint's model, and meta-device templates of its decoder layers.

    Args:
        device: of materialised parameters.
        dtype: of the computation; None: the config's.
        ignore: globs over the names of projections that are left alone.

    Raises:
        InputError: its weights are quantised, transformers builds no model from its config, or the layers of that model
            are not such that shardprune prunes them; a glob matches no projection.
    """

    def __init__(
        self,
        config: PretrainedConfig,
        device: torch.device | str,
        dtype: torch.dtype | None = None,
        ignore: Sequence[str] = (),
    ) -> None:
        self.config = config
        self.device = torch.device(device)
        self.dtype = dtype or config.dtype or torch.float32
        if getattr(config, "quantization_config", None):
            raise InputError("model", "its weights are quantised; give the checkpoint that they were made from")
        self.model = empty_model(config, self.dtype, self.device)
        self.model.eval().requires_grad_(False)
        take_apart(self.model)
        self.family = ignoring(family_of_model(self.model), ignore)
        listed = self.model.get_submodule(self.family.layers)
        assert isinstance(listed, nn.ModuleList)
        self._blanks: Sequence[nn.Module] = list(listed)
        # Another thread may copy a blank while the model runs with stand-ins, so that those get layers of their own.
        self._places = [copy.copy(blank) for blank in self._blanks]
        for index, place in enumerate(self._places):
            listed[index] = place
        for blank, kind in zip(self._blanks, self.family.kinds, strict=True):
            if not kind.runs:
                blank.__dict__["forward"] = passing_on
        self._inside = f"{self.family.layers}."
        self._dtypes = dtypes_of(self.model, self.dtype)
        self._unread = {name for name in persistent_buffers(self.model) if not name.startswith(self._inside)}
        self._arguments: dict[tuple[int, int], list[Arguments]] = {}

    @property
    def layers(self) -> int:
        return len(self._blanks)

    @property
    def attentions(self) -> int:
        """The number of attentions of each layer, by the layers that the config counts."""
        return max(1, self.config.num_hidden_layers // self.layers)

    @property
    def has_experts(self) -> bool:
        """Whether any layer is a mixture of experts."""
        return any(kind.mixtures for kind in self.family.kinds)

    @property
    def adds_outputs(self) -> bool:
        """Whether what output projections give is added to the residual stream as it is."""
        adds = self.family.structures.adds_outputs
        return bool(getattr(self.config, adds)) if isinstance(adds, str) else adds

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Return the checkpoint names and shapes of all parameters and persistent buffers; tied ones count once."""
        tensors = {name: tuple(p.shape) for name, p in self._frame_parameters().items()}
        buffers = persistent_buffers(self.model)
        tensors |= {name: tuple(b.shape) for name, b in buffers.items() if not name.startswith(self._inside)}
        for index in range(self.layers):
            tensors |= self.layer_tensors(index)
        return tensors

    def is_table(self, name: str) -> bool:
        """Return whether a tensor of the model holds integers, as a table of the experts of each token does."""
        return not self._dtypes[name].is_floating_point

    def wave_columns(self, seqlen: int) -> int:
        """Return the columns of a wave of sequences of `seqlen` tokens: those of the hidden states, where nothing else
        passes from layer to layer."""
        return self.family.carried.columns(seqlen, self.dtype.itemsize)

    def states(self, wave: Tensor) -> Tensor:
        """Return the columns [batch, seqlen, hidden] of a wave that are hidden states, of all streams."""
        carried = self.family.carried
        return wave if carried.stateless else wave[..., : carried.states]

    def parameters(self) -> int:
        """Return the number of parameters of the model; tied ones count once."""
        return sum(math.prod(parameter.shape) for parameter in self.model.parameters())

    # -- layers ---------------------------------------------------------------------------------------

    def layer_tensors(self, index: int) -> dict[str, tuple[int, ...]]:
        """Return the checkpoint names and shapes of one decoder layer's parameters and persistent buffers."""
        prefix = f"{self.family.layers}.{index}."
        return {prefix + name: tuple(tensor.shape) for name, tensor in self._blanks[index].state_dict().items()}

    def blank(self, index: int) -> nn.Module:
        """Return one decoder layer without values."""
        return self._blanks[index]

    def projection_tensor(self, index: int, projection: str) -> str:
        """Return the checkpoint name of a projection's weight."""
        return f"{self.family.layers}.{index}.{projection}.weight"

    def projection_shapes(self, index: int) -> dict[str, tuple[int, int]]:
        """Return [rows, cols] of one layer's projections, in the order of the forward pass."""
        return {name: self.map_shape(index, name) for name in self.family.kinds[index].projections}

    def map_shape(self, index: int, name: str) -> tuple[int, int]:
        """Return [rows, cols] of one of a layer's linear maps."""
        rows, cols = projection_weight(self._blanks[index], name).shape
        return rows, cols

    def build_layer(self, index: int, tensors: Iterable[tuple[str, Tensor]]) -> nn.Module:
        """Build a decoder layer on the device from the given checkpoint tensors.

        They are converted one by one as they arrive. Parameters own their memory, so that solvers may write into them.
        """
        layer = copy.deepcopy(self._blanks[index])
        allocate(layer, self.device, self.dtype)
        prefix = f"{self.family.layers}.{index}."
        for name, tensor in tensors:
            path, _, leaf = name.removeprefix(prefix).rpartition(".")
            module, value = layer.get_submodule(path), tensor.to(self.device, self._dtypes[name])
            if isinstance(module, Part):
                module.weight.copy_(value)
            elif leaf in module._buffers:
                module._buffers[leaf] = value
            else:
                module._parameters[leaf] = nn.Parameter(value, requires_grad=False)
        return layer

    def layer_arguments(self, index: int, batch: int, seqlen: int) -> Arguments:
        """Return the arguments of layer `index`, beside the hidden states, for a wave [batch, seqlen] of full-length
        sequences."""
        key = (batch, seqlen)
        arguments = self._arguments.pop(key, None)
        if arguments is None:
            recorders = [Recorder(kind.returned) for kind in self.family.kinds]
            self._run(recorders, self.model.base_model, batch, seqlen)
            carried = self.family.carried
            arguments = [one.arguments.carried_by(carried, place) for place, one in enumerate(recorders)]
        self._arguments[key] = arguments  # last in order: the least recently used entry is dropped first
        while len(self._arguments) > SHAPES:
            del self._arguments[next(iter(self._arguments))]
        return arguments[index]

    def next_arguments(self, batch: int, kept: KeptKeys) -> list[Arguments]:
        """Return the arguments of all layers, beside the hidden states, for the next token of `batch` sequences, whose
        keys and values they add to those that are kept."""
        recorders = [Recorder(kind.returned) for kind in self.family.kinds]
        self._run(recorders, self.model.base_model, batch, 1, kept)
        return [recorder.arguments for recorder in recorders]

    @staticmethod
    def forward_layer(layer: nn.Module, hidden: Tensor, arguments: Arguments) -> Tensor:
        """Apply one decoder layer to a wave [batch, seqlen, columns]."""
        call = arguments.call(hidden)
        return call.image(layer(*call.positional, **call.keywords))

    # -- the frame --------------------------------------------------------------------------------------

    def load_frame(self, checkpoint: TensorSource, embedding: bool = False, head: bool = False) -> None:
        """Materialise the small parts of the frame (norms, learned positions, persistent buffers), and on request the
        input embedding and the output head, which are one tensor if the model ties them.
        """
        inputs, outputs = self.model.get_input_embeddings().weight, self.model.get_output_embeddings().weight
        further = further_embedding(self.model)
        skipped = set() if embedding or further is None else {id(further)}
        if not embedding and not (head and inputs is outputs):
            skipped.add(id(inputs))
        if not head and not (embedding and inputs is outputs):
            skipped.add(id(outputs))
        read = {name: p for name, p in self._frame_parameters().items() if id(p) not in skipped and p.is_meta}
        for name, parameter in read.items():
            self._replace(parameter, checkpoint.read(name).to(self.device, self._dtypes[name]))
        buffers, self._unread = self._unread, set()
        for name in buffers:
            path, _, leaf = name.rpartition(".")
            buffer = checkpoint.read(name).to(self.device, self._dtypes[name])
            self.model.get_submodule(path)._buffers[leaf] = buffer
        if names := [*read, *buffers]:
            checkpoint.check_unchanged(names)

    def drop_embeddings(self) -> None:
        """Free the memory of the input embedding and the output head."""
        modules = (self.model.get_input_embeddings(), self.model.get_output_embeddings())
        further = further_embedding(self.model)
        for parameter in [*(one for module in modules for one in module.parameters()), further]:
            if parameter is not None and not parameter.is_meta:
                self._replace(parameter, torch.empty_like(parameter, device="meta"))

    def embed(self, tokens: Tensor, kept: KeptKeys | None = None) -> Tensor:
        """Compute the wave [batch, seqlen, columns] that enters the first layer from tokens [batch, seqlen]: hidden
        states, and what else passes from layer to layer.

        Args:
            kept: of the tokens before these, where there are any.
        """
        recorders = [Recorder(kind.returned) for kind in self.family.kinds]
        tokens = tokens.to(self.device)
        with standing_in(self._places, recorders):
            self.model.base_model(input_ids=tokens, **self._keeping(kept))
        carried = self.family.carried
        hidden = next(one.hidden for one in recorders if one.hidden is not None)  # not all layers may run
        own = [one.arguments.carried_by(carried, 0).keywords[OWN] for one in recorders] if carried.own else []
        return carried.wave(hidden, own, tokens)

    def logits(self, hidden: Tensor) -> Tensor:
        """Compute the logits [batch, seqlen, vocabulary] from the last layer's wave [batch, seqlen, columns]."""
        return self._behind_layers(hidden, self.model).logits

    def last_hidden_states(self, hidden: Tensor) -> Tensor:
        """Compute what the model without its head gives [batch, seqlen, width], from the same."""
        return self._behind_layers(hidden, self.model.base_model).last_hidden_state

    # -- inside -------------------------------------------------------------------------------------------

    def _frame_parameters(self) -> dict[str, nn.Parameter]:
        """The parameters beside the layers by name; tied ones once."""
        return {name: p for name, p in self.model.named_parameters() if not name.startswith(self._inside)}

    def _behind_layers(self, hidden: Tensor, model: nn.Module) -> Any:
        states = self.family.carried.hidden_states(hidden)
        stand_ins = [returning(states, kind.returned) for kind in self.family.kinds]
        return self._run(stand_ins, model, *hidden.shape[:2])

    def _run(
        self, stand_ins: Sequence[StandIn], model: nn.Module, batch: int, seqlen: int, kept: KeptKeys | None = None
    ) -> Any:
        """Run a model's forward pass with stand-ins for its layers, on an embedding of zeros."""
        width = self.model.get_input_embeddings().embedding_dim
        blank = torch.zeros(batch, seqlen, width, dtype=self.dtype, device=self.device)
        with standing_in(self._places, stand_ins):
            return model(inputs_embeds=blank, **self._keeping(kept), **frame_inputs(self.model, blank))

    def _keeping(self, kept: KeptKeys | None) -> dict[str, Any]:
        """The arguments of a model that say what is kept."""
        if kept is None:
            return {"use_cache": False}
        return going_on(self.model.base_model, kept, kept.seen, self.device)

    def _replace(self, parameter: nn.Parameter, tensor: Tensor) -> None:
        """Replace a parameter wherever it is registered: a tied one is in two modules."""
        new = nn.Parameter(tensor, requires_grad=False)
        for module in self.model.modules():
            for name, value in module._parameters.items():
                if value is parameter:
                    module._parameters[name] = new


def projection_weight(layer: nn.Module, projection: str) -> Tensor:
    """Return the weight [rows, cols] of one of a decoder layer's projections."""
    return layer.get_parameter(f"{projection}.weight")
