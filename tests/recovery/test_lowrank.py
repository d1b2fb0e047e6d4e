"""Low-rank updates against plain autograd, against peft, and against themselves merged."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

import shardprune.recovery.masked_update
from shardprune.recovery.lowrank import LowRankLinear, add_updates

ROWS, COLS, RANK, ALPHA = 6, 10, 3, 7.0


@pytest.fixture(autouse=True)
def _narrow_blocks(monkeypatch):
    """Three blocks of columns and two of rows, the last ones narrower."""
    monkeypatch.setattr(shardprune.recovery.masked_update, "BLOCK", 4)


def sparse_linear(bias=True):
    linear = nn.Linear(COLS, ROWS, bias=bias)
    linear.weight.data[torch.rand(ROWS, COLS) < 0.5] = 0
    return linear.requires_grad_(False)


def updated(linear, dropout=0.0, masked=True):
    """An update whose B is not zero any more."""
    module = LowRankLinear(linear, RANK, ALPHA, dropout, masked)
    module.reset(torch.Generator().manual_seed(0))
    nn.init.normal_(module.lora_B)
    return module


def plain(linear, a, b, inputs, dropped, masked):
    mask = (linear.weight != 0).float() if masked else torch.ones_like(linear.weight)
    return inputs @ linear.weight.T + linear.bias + dropped @ (mask * (ALPHA / RANK) * (b @ a)).T


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("shape", [(5, COLS), (2, 5, COLS)])
def test_outputs_and_gradients_are_those_of_the_formula(masked, dropout, shape):
    torch.manual_seed(1)
    linear = sparse_linear()
    module = updated(linear, dropout, masked)
    a, b = (parameter.detach().clone().requires_grad_() for parameter in (module.lora_A, module.lora_B))
    inputs, same = (torch.ones(shape).normal_(generator=torch.Generator().manual_seed(2)) for _ in range(2))
    inputs.requires_grad_()
    same.requires_grad_()
    torch.manual_seed(3)
    output = module(inputs)
    torch.manual_seed(3)
    expected = plain(linear, a, b, same, nn.functional.dropout(same, dropout), masked)
    torch.testing.assert_close(output, expected)
    gradient = torch.randn_like(expected)
    output.backward(gradient)
    expected.backward(gradient)
    for ours, theirs in ((inputs, same), (module.lora_A, a), (module.lora_B, b)):
        torch.testing.assert_close(ours.grad, theirs.grad)
    assert module.weight.grad is None


@pytest.mark.parametrize("inputs_too", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_gradients_are_numerically_right(dropout, inputs_too):
    torch.manual_seed(1)
    module = updated(sparse_linear(), dropout).double()
    inputs = torch.randn(2, 4, COLS, dtype=torch.float64, requires_grad=inputs_too)
    a, b = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((RANK, COLS), (ROWS, RANK)))

    def outputs(inputs, a, b):
        torch.manual_seed(2)  # the same inputs are dropped every time
        return torch.func.functional_call(module, {"lora_A": a, "lora_B": b}, (inputs,))

    torch.autograd.gradcheck(outputs, (inputs, a, b))


def test_dropout_is_off_in_evaluation():
    torch.manual_seed(1)
    module = updated(sparse_linear(), dropout=0.9)
    inputs = torch.randn(4, COLS)
    module.eval()
    expected = inputs @ module.merged(module.weight).T + module.bias
    torch.testing.assert_close(module(inputs), expected)


def test_an_update_starts_as_nothing_and_from_the_seed_alone():
    def made(seed):
        torch.manual_seed(1)
        model = nn.ModuleDict({"one": sparse_linear(), "two": sparse_linear()})
        before = copy.deepcopy(model)
        modules = list(add_updates(model, ["one", "two"], RANK, ALPHA, 0.0, True, seed))
        inputs = torch.randn(4, COLS)
        assert all(torch.equal(model[name](inputs), before[name](inputs)) for name in model)
        return [module.lora_A.detach() for module in modules]

    first, torn, other = made(0), made(0), made(1)
    assert all(map(torch.equal, first, torn))
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first[0], other[0])


@pytest.mark.parametrize("masked", [True, False])
def test_the_merged_model_is_the_live_one(folder, masked):
    targets = [f"model.layers.{layer}.mlp.{name}_proj" for layer in range(2) for name in ("gate", "up", "down")]
    live, merged = (AutoModelForCausalLM.from_pretrained(folder / "sparse") for _ in range(2))
    for path, module in zip(targets, add_updates(live, targets, RANK, ALPHA, 0.3, masked, 0), strict=True):
        nn.init.normal_(module.lora_B, 0, 0.2)
        linear = merged.get_submodule(path)
        zeros = linear.weight == 0
        linear.weight.data = module.merged(module.weight.detach())
        assert torch.equal(zeros, linear.weight == 0) is masked
    tokens = torch.randint(0, 64, (2, 12))
    torch.testing.assert_close(live.eval()(tokens).logits, merged(tokens).logits, atol=1e-4, rtol=1e-4)


def test_without_a_mask_it_is_pefts():
    torch.manual_seed(1)
    linear = sparse_linear()
    ours = updated(copy.deepcopy(linear), masked=False)
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules=["only"])
    theirs = get_peft_model(_Only(linear), config)
    layer = theirs.base_model.model.only
    layer.lora_A["default"].weight.data = ours.lora_A.data.clone()
    layer.lora_B["default"].weight.data = ours.lora_B.data.clone()
    inputs = torch.randn(4, COLS)
    output, expected = ours(inputs), theirs(inputs)
    torch.testing.assert_close(output, expected)
    output.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(ours.lora_A.grad, layer.lora_A["default"].weight.grad)
    torch.testing.assert_close(ours.lora_B.grad, layer.lora_B["default"].weight.grad)
    torch.testing.assert_close(ours.merged(ours.weight.detach()), theirs.merge_and_unload().only.weight)


class _Only(nn.Module):
    def __init__(self, linear) -> None:
        super().__init__()
        self.only = linear

    def forward(self, inputs):
        return self.only(inputs)
