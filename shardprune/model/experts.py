"""The experts of a layer, whose parts are linear maps of their own.

transformers keeps all experts of a layer in a few parameters: `gate_up_proj` [experts, rows of gate and up, cols] (or
`up_proj`) and `down_proj`. Its code multiplies tokens with one expert's matrix after the other, as the router says.
Here each part of an expert is an `nn.Linear` besides, `experts.3.gate_proj`, whose weight is a view of the parameter.
It is a projection as any other: it has a name in the files, can be pruned in place, and its hooks see the tokens that
are routed to it, while the class's own code runs.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from shardprune.model.scaled_experts import route_tokens
from shardprune.storage.stacks import Layout

GATE, UP, DOWN = "gate_proj", "up_proj", "down_proj"
STACKS: dict[str, tuple[str, ...]] = {"gate_up_proj": (GATE, UP), "up_proj": (UP,), "down_proj": (DOWN,)}  # their parts
# Classes of experts that transformers does not declare as such, with the layout of their matrices.
UNDECLARED = {
    "Llama4TextExperts": Layout(transposed=True, interleaved=False),
    "LongcatFlashExperts": Layout(transposed=False, interleaved=False),
}
IDLE = "zero_expert_num"  # of experts without weights, which pass tokens on as they are, in configs and their classes
PRODUCTS = (nn.functional.linear, Tensor.matmul, Tensor.__matmul__, torch.matmul)


class Part(nn.Linear):
    """A part of an expert. It is called with its inputs and the outputs that the expert's own code has computed.

    Args:
        weight: [rows, cols], a view of the parameter of all experts.
    """

    def __init__(self, weight: Tensor) -> None:
        nn.Module.__init__(self)  # there are thousands: no memory and no values of their own
        self.out_features, self.in_features = weight.shape
        self.register_parameter("weight", nn.Parameter(weight, requires_grad=False))
        self.register_parameter("bias", None)

    def forward(self, input: Tensor, output: Tensor) -> Tensor:  # type: ignore[override]
        return output


class Expert(nn.Module):
    """The parts of one expert by name."""

    def __init__(self, parts: dict[str, Part]) -> None:
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)


class Stack:
    """A parameter [experts, ...] of which each expert's matrix is made of the weights of its parts.

    Where the weights are views of `values`, a matrix is, too; where others stand in for them, it is put together, so
    that gradients reach them. Where the parts are `apart`, it is never put together, but each is multiplied by itself.

    Args:
        values: the parameter, on the meta device.
        layout: of the parts in a matrix.
    """

    apart = False

    def __init__(self, values: Tensor, names: tuple[str, ...], layout: Layout) -> None:
        self.values = values.detach()
        self.names = names
        self._layout = layout
        self.parts = [[Part(weight) for weight in self._views(matrix)] for matrix in self.values]  # by expert

    def allocate(self, device: torch.device, dtype: torch.dtype) -> None:
        """Take memory for the matrices, of which the parts' weights become views."""
        self.values = torch.empty(self.values.shape, dtype=dtype, device=device)
        for matrix, parts in zip(self.values, self.parts, strict=True):
            for part, weight in zip(parts, self._views(matrix), strict=True):
                part.weight = nn.Parameter(weight, requires_grad=False)

    def separate(self) -> None:
        """Give each part a weight with memory of its own; the parameter is no more."""
        for part in (part for parts in self.parts for part in parts):
            part.weight = nn.Parameter(part.weight.detach().clone(memory_format=torch.contiguous_format))
        self.values, self.apart = self.values.to("meta"), True

    def _views(self, matrix: Tensor) -> list[Tensor]:
        return self._layout.parts(matrix, len(self.names))

    def __getitem__(self, expert: Tensor | int) -> Tensor:
        """Return the matrix of one expert, which tells the expert's parts when it is multiplied with tokens."""
        parts, matrix = self.parts[int(expert)], self.values[int(expert)]
        if self.apart:
            return _marked(parts[0].weight.detach(), self, parts)
        weights = [part.weight for part in parts]
        if not all(map(_is_view, weights, self._views(matrix))):
            matrix = self._layout.joined(weights)
        return _marked(matrix, self, parts)

    def tell(self, parts: list[Part], tokens: Tensor, outputs: Tensor) -> Tensor:
        """Call the parts of an expert with the tokens [count, cols] that it got, and with their outputs; return the
        outputs of all. They are made of those of the parts where gradients flow, which reach the parts' own then.
        """
        count = len(parts)
        if self._layout.interleaved:
            own = [outputs[..., place::count] for place in range(count)]
        else:
            own = list(outputs.chunk(count, dim=-1))
        told = [part(tokens, output) for part, output in zip(parts, own, strict=True)]
        if not any(output.requires_grad for output in told):
            return outputs
        return self._joined(told)

    def products(self, parts: list[Part], tokens: Tensor) -> Tensor:
        """Return the outputs of all parts of an expert that got some tokens [count, cols], each by its own weight."""
        return self._joined([part(tokens, nn.functional.linear(tokens, part.weight)) for part in parts])

    def _joined(self, outputs: list[Tensor]) -> Tensor:
        """Return the outputs [count, rows] of the matrix that has these parts."""
        return torch.stack(outputs, dim=-1).flatten(-2) if self._layout.interleaved else torch.cat(outputs, dim=-1)


class _Matrix(Tensor):
    """The matrix of one expert, [rows, cols] or transposed, as its code multiplies tokens with it."""

    stack: Stack
    parts: list[Part]

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        matrix = args[1] if function in PRODUCTS and len(args) == 2 and not kwargs else None
        if isinstance(matrix, cls) and matrix.stack.apart:
            return matrix.stack.products(matrix.parts, args[0])
        with torch._C.DisableTorchFunctionSubclass():
            result = function(*args, **(kwargs or {}))
        if isinstance(matrix, cls):
            return matrix.stack.tell(matrix.parts, args[0], result)
        if isinstance(result, Tensor):
            raise NotImplementedError(f"an expert's matrix is used in {getattr(function, '__name__', function)}")
        return result


def _marked(matrix: Tensor, stack: Stack, parts: list[Part]) -> _Matrix:
    seen = matrix.as_subclass(_Matrix)
    seen.stack, seen.parts = stack, parts
    return seen


def _is_view(weight: Tensor, view: Tensor) -> bool:
    """Return whether a weight is a view, and no other tensor in its place or one whose gradient is wanted."""
    return not weight.requires_grad and (weight.is_meta or weight.data_ptr() == view.data_ptr())


def take_apart(model: nn.Module) -> None:
    """Give the experts of an empty model's layers a linear map for each of their parts.

    Matrices behind those of the experts, which LongCat has for experts that pass tokens on as they are, and never uses,
    are no part of the model any more.
    """
    route_tokens(model)
    for module in list(model.modules()):
        if not is_mixture(module):
            continue
        stacks, count = {}, experts_of(module)
        for name, names in STACKS.items():
            if name in module._parameters:
                values = module.get_parameter(name)[:count]
                stacks[name] = Stack(values, names, layout_of(module))
                del module._parameters[name]
                setattr(module, name, stacks[name])
        for place, parts in enumerate(zip(*(stack.parts for stack in stacks.values()), strict=True)):
            named = zip(stacks.values(), parts, strict=True)
            own = {name: part for stack, held in named for name, part in zip(stack.names, held, strict=True)}
            module.add_module(str(place), Expert(own))


def is_mixture(module: nn.Module) -> bool:
    """Return whether a module holds the experts of a layer in parameters that they share, as transformers declares
    them."""
    declared = all(hasattr(module, name) for name in ("is_transposed", "is_concatenated", "has_gate"))
    known = declared or type(module).__name__ in UNDECLARED
    return known and module._parameters.get("down_proj") is not None


def experts_of(mixture: nn.Module) -> int:
    """Return the number of experts that have weights."""
    return len(mixture.get_parameter(DOWN))


def idle_experts(mixture: nn.Module) -> int:
    """Return the number of experts without weights."""
    return getattr(mixture, IDLE, None) or 0


def layout_of(mixture: nn.Module) -> Layout:
    """Return the layout of a mixture's matrices."""
    if (known := UNDECLARED.get(type(mixture).__name__)) is not None:
        return known
    return Layout(transposed=bool(mixture.is_transposed), interleaved=not mixture.is_concatenated)


def stacks_of(layer: nn.Module) -> Iterator[tuple[nn.Module, Stack]]:
    """Yield the stacks of a layer's experts, with the module that holds them."""
    for module in layer.modules():
        for value in vars(module).values():
            if isinstance(value, Stack):
                yield module, value


def mixtures(layer: nn.Module) -> dict[str, nn.Module]:
    """Return the modules of a layer whose experts have been taken apart, by path."""
    taken_apart = {id(module) for module, _ in stacks_of(layer)}
    return {path: module for path, module in layer.named_modules() if id(module) in taken_apart}


def run_on_meta(mixture: nn.Module, hidden: Tensor) -> Tensor:
    """Call the parts of all experts of a mixture on the meta device, where no router can choose; return the outputs for
    tokens [count, hidden]."""
    for expert in mixture.children():
        if isinstance(expert, Expert):
            shared = torch.empty_like(hidden)
            for name, part in expert.named_children():
                assert isinstance(part, Part)
                tokens = hidden.new_empty(len(hidden), part.in_features) if name == DOWN else shared
                part(tokens, hidden.new_empty(len(hidden), part.out_features))
    return torch.empty_like(hidden)


def allocate(layer: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Take memory for the experts of a layer that has been taken apart."""
    for _, stack in stacks_of(layer):
        stack.allocate(device, dtype)


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of a model whose experts are as transformers has them, by the names that they have once the
    experts are taken apart: those of parts are views."""
    tensors = dict(model.state_dict(keep_vars=True))
    for path, module in model.named_modules():
        if is_mixture(module):
            for name, names in STACKS.items():
                if (values := tensors.pop(f"{path}.{name}", None)) is None:
                    continue
                for expert, matrix in enumerate(values[: experts_of(module)]):
                    weights = layout_of(module).parts(matrix, len(names))
                    for part, weight in zip(names, weights, strict=True):
                        tensors[f"{path}.{expert}.{part}.weight"] = weight
    return tensors
