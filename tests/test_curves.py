"""Error curves of `benchmarks.curves` against their definition by autograd."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks.curves import ROWS, Curvature, curve, levels_around
from shardprune.solvers.methods import Target
from shardprune.solvers.pattern import Unstructured
from shardprune.solvers.sparsegpt import prune_together
from tests.support.tiny import make_model

NAMES = ("self_attn.q_proj", "mlp.down_proj")


def test_curvature_is_that_of_the_loss_with_labels_of_the_model(tmp_path):
    make_model(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32).eval().requires_grad_(False)
    projections = {(1, name): model.get_submodule(f"model.layers.1.{name}") for name in NAMES}
    windows = torch.randint(2, 60, (3, 16), generator=torch.Generator().manual_seed(0))
    curvature = Curvature(projections)
    curvature.add(model, windows, seed=5)
    rows = {place: found.clone() for place, found in curvature.rows.items()}  # hooks go on adding

    kept = {}
    hooks = [
        module.register_forward_hook(lambda _m, i, o, place=place: kept.__setitem__(place, (i[0], o)))
        for place, module in projections.items()
    ]
    embedded = model.get_input_embeddings()(windows).requires_grad_()
    logits = model(inputs_embeds=embedded).logits.flatten(0, 1)
    labels = torch.multinomial(logits.softmax(-1), 1, generator=torch.Generator().manual_seed(5))[:, 0]
    loss = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
    gradients = torch.autograd.grad(loss, [output for _, output in kept.values()])
    for hook in hooks:
        hook.remove()
    for (place, (inputs, _)), gradient in zip(kept.items(), gradients, strict=True):
        tokens = inputs.detach().flatten(0, 1)
        assert torch.allclose(rows[place], gradient.flatten(0, 1).square().sum(0), rtol=1e-4)
        # The first pass saw the inputs once, the second, through the hooks that are still there, once more.
        assert torch.allclose(curvature.inputs[place].gram, 2 * tokens.T @ tokens, rtol=1e-3, atol=1e-3)

        weight = projections[place].weight
        some = weight[::ROWS]
        for level, error in curve(weight, curvature.inputs[place], curvature.rows[place], [0.5, 0.7]):
            (solution,) = prune_together([Target(some, Unstructured(), level)], curvature.inputs[place])
            change = (some - solution.weight).double()
            moved = (change @ (2 * tokens.T @ tokens).double() * change).sum(1)
            expected = float(moved @ curvature.rows[place][::ROWS].double()) * len(weight) / len(some)
            assert error == pytest.approx(expected, rel=1e-3)


def test_levels_lie_around_the_sparsity():
    assert levels_around(0.7) == [0.5, 0.6, 0.7, 0.8, 0.9]
    assert levels_around(0.9) == [0.7, 0.8, 0.9, 0.98]
    assert levels_around(0.1) == [0.05, 0.1, 0.2, 0.3]
