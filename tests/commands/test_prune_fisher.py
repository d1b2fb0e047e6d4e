"""Runs whose sparsity is shared out by error curves: the curves by definition, layouts, restarts, and what is kept."""

import json

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from shardprune.solvers.allocation.knapsack import share_out
from shardprune.solvers.error_curves import LABEL_SEED, ROWS
from shardprune.solvers.pattern import Unstructured
from shardprune.solvers.sampling import drawn_tokens, draws
from shardprune.solvers.sparsegpt import prune
from shardprune.solvers.statistics import InputStatistics
from tests.support.running import run
from tests.support.tiny import differing, load_tensors

FISHER = {"allocation": "fisher", "sparsity": 0.7}


@pytest.fixture(scope="module")
def single(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("single") / "o"
    return out, run(folder, out, **FISHER)


def content(out):
    return json.loads((out / "allocation.json").read_text())


def curves(out):
    return {(share["layer"], share["name"]): share["curve"] for share in content(out)["projections"]}


def by_definition(folder, model="model", tokens="tokens.npy"):
    """The curves of all projections, from the whole dense model, forward and backward by autograd in one piece."""
    whole = AutoModelForCausalLM.from_pretrained(folder / model, dtype=torch.float32).eval()
    windows = torch.from_numpy(np.load(folder / tokens))
    seen = {}
    modules = {
        (index, name): module
        for index, layer in enumerate(whole.model.layers)
        for name, module in layer.named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    for place, module in modules.items():
        module.register_forward_hook(lambda _m, i, o, place=place: seen.__setitem__(place, (i[0], o)))
    logits = whole(windows).logits
    uniform = draws(LABEL_SEED, range(len(windows)), windows.shape[1])
    labels = drawn_tokens(logits.detach().flatten(0, 1), 1.0, uniform.flatten())
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels, reduction="sum")
    gradients = torch.autograd.grad(loss, [output for _, output in seen.values()])
    found, count = {}, windows.numel()
    for (place, (inputs, _)), gradient in zip(seen.items(), gradients, strict=True):
        inputs, rows = inputs.detach().flatten(0, 1), gradient.double().flatten(0, 1).square().sum(0)
        statistics = InputStatistics.empty("gram", inputs.shape[1])
        statistics.add(inputs, len(windows))
        weight = modules[place].weight.detach()
        some, moment = weight[::ROWS], inputs.double().t() @ inputs.double() / count
        found[place] = []
        for level in (0.5, 0.6, 0.7, 0.8, 0.9):
            change = (some - prune(some, statistics, Unstructured(), level).weight).double()
            lost = ((change @ moment) * change).sum(1) @ rows[::ROWS] / count
            found[place].append((level, float(lost) * len(weight) / len(some) / 2))
    return found


def test_curves_are_those_of_the_definition(folder, single):
    found, expected = curves(single[0]), by_definition(folder)
    assert found.keys() == expected.keys()
    for place, curve in expected.items():
        assert [level for level, _ in found[place]] == [level for level, _ in curve]
        assert [error for _, error in found[place]] == pytest.approx([error for _, error in curve], rel=1e-3), place


def sizes_of(out):
    tensors = load_tensors(out)
    return {place: tensors["model.layers.{}.{}.weight".format(*place)].numel() for place in curves(out)}


def test_what_projections_give_up_is_the_knapsack_s_and_meets_the_target(single):
    out, result = single
    sizes = sizes_of(out)
    expected = share_out(curves(out), sizes, 0.7)
    assert {(report.layer, report.name): report.target for report in result.sparsity.projections} == expected
    assert len(set(expected.values())) > 5
    assert result.sparsity.allocated == pytest.approx(0.7, abs=1e-9)
    assert abs(result.sparsity.achieved - 0.7) * sum(sizes.values()) <= len(sizes)


@pytest.mark.parametrize(
    "layout",
    [
        {"shards": 3},
        {"shards": 3, "weights": "streamed"},
        {"activations": "device"},
    ],
    ids=str,
)
def test_layout_does_not_change_a_bit(folder, single, tmp_path, layout):
    run(folder, tmp_path / "o", **layout, **FISHER)
    assert differing(single[0], tmp_path / "o") == []
    assert content(tmp_path / "o") == content(single[0])


def test_replicas_change_only_the_order_of_sums(folder, single, tmp_path):
    run(folder, tmp_path / "o", replicas=3, shards=2, **FISHER)
    for place, curve in curves(tmp_path / "o").items():
        assert curve == [pytest.approx(point, rel=1e-3) for point in curves(single[0])[place]]
