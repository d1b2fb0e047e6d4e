"""Runs over mixtures of experts: what they measure, report and write."""

import functools
import json
import re

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from shardprune.errors import InputError
from shardprune.model.checkpoint import Checkpoint
from shardprune.model.empty_model import persistent_buffers
from shardprune.model.skeleton import Skeleton
from shardprune.solvers.error_curves import LABEL_SEED, ROWS
from shardprune.solvers.methods import Target
from shardprune.solvers.pattern import Unstructured
from shardprune.solvers.sampling import drawn_tokens, draws
from shardprune.solvers.sparsegpt import prune_together
from shardprune.solvers.statistics import PRIOR_TOKENS, InputStatistics
from tests.commands.test_architectures import perplexity
from tests.support.architectures import MIXTURES, make_architecture
from tests.support.entries import entries
from tests.support.running import run
from tests.support.tiny import differing, load_tensors, make_tokens

# What others show, by their layers and the names of their tensors.
ALIKE = (
    *("deepseek_v2", "deepseek_v32", "dots1", "glm4_moe", "glm4_moe_lite", "hunyuan_v1_moe", "jamba", "minimax_m2"),
    *("qwen2_moe", "qwen3_5_moe_text"),
)


@pytest.mark.parametrize("model_type", entries(list(MIXTURES), *ALIKE))
def test_a_run_equals_transformers_before_and_after(model_type, tmp_path):
    dense = make_architecture(tmp_path / "model", model_type, MIXTURES[model_type])
    tokens = torch.from_numpy(np.load(make_tokens(tmp_path / "tokens.npy")))
    text = str(tmp_path / "tokens.npy")
    checkpoint = Checkpoint(dense)
    skeleton = Skeleton(checkpoint.config, "cpu")
    for out, fields in (
        ("half", {"sparsity": 0.5}),
        ("groups", {"pattern": "2:4", "shards": 2, "weights": "streamed"}),
    ):
        result = run(tmp_path, out, eval=(text,), **fields)
        (measured,) = result.perplexity.values()
        assert measured.before == pytest.approx(perplexity(dense, tokens), rel=1e-4)
        assert measured.after == pytest.approx(perplexity(tmp_path / out, tokens), rel=1e-4)
        assert measured.after != measured.before

        before, after = load_tensors(dense), load_tensors(tmp_path / out)
        assert {name: tensor.shape for name, tensor in before.items()} == {
            name: tensor.shape for name, tensor in after.items()
        }
        pruned = {
            checkpoint.stored_name(skeleton.projection_tensor(one.layer, one.name))
            for one in result.sparsity.projections
        }
        assert {name for name in before if not torch.equal(before[name], after[name])} == pruned
        left = {
            stored
            for layer, kind in enumerate(skeleton.family.kinds)
            for names in kind.kept.values()
            for name in names
            for stored in checkpoint.place(f"{skeleton.family.layers}.{layer}.{name}").names
        }
        inside = re.compile(rf"{skeleton.family.layers}\.|backbone\.layers\.")
        buffers = {checkpoint.stored_name(name) for name in persistent_buffers(skeleton.model)}
        matrices = {name for name in before if before[name].dim() > 1 and inside.match(name)} - buffers
        assert pruned | left == matrices - of_no_use(model_type, before)
        zeros = sum(int((after[name] == 0).sum()) for name in pruned)
        weights = sum(before[name].numel() for name in pruned)
        assert zeros / weights == result.sparsity.achieved == pytest.approx(0.5, abs=1e-3)
        assert sum(facts.achieved == 0.5 for facts in result.sparsity.projections) > 1
    run(tmp_path, "single", pattern="2:4")
    assert differing(tmp_path / "single", tmp_path / "groups") == []


def of_no_use(model_type, tensors):
    """The matrices that transformers stores for LongCat's experts without weights, behind those of the others."""
    behind = re.compile(r".*\.mlp\.experts\.[45]\.(gate|up)_proj\.weight")
    found = {name for name in tensors if behind.fullmatch(name)} if model_type == "longcat_flash" else set()
    assert len(found) == (2 * 2 * 2 if model_type == "longcat_flash" else 0)  # layers, experts, parts
    return found


def test_what_longcat_does_not_use_may_be_missing(tmp_path):
    """The files that it comes with have no tensors of experts that pass tokens on as they are."""
    make_architecture(tmp_path / "model", "longcat_flash", MIXTURES["longcat_flash"])
    make_tokens(tmp_path / "tokens.npy")
    file = tmp_path / "model" / "model.safetensors"
    stored = load_file(file)
    run(tmp_path, "with", pattern="2:4")
    unused = of_no_use("longcat_flash", stored)
    save_file({name: tensor for name, tensor in stored.items() if name not in unused}, file, {"format": "pt"})
    run(tmp_path, "without", pattern="2:4")
    after, fewer = load_tensors(tmp_path / "with"), load_tensors(tmp_path / "without")
    assert {name for name in after if name not in fewer} == unused
    assert all(torch.equal(after[name], fewer.get(name, stored[name])) for name in after)


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    """A folder with a Qwen3-MoE of which two experts are never chosen."""
    folder = tmp_path_factory.mktemp("mixture")
    make_architecture(folder / "plain", "qwen3_moe", MIXTURES["qwen3_moe"])
    model = AutoModelForCausalLM.from_pretrained(folder / "plain")
    for layer in model.model.layers:
        one, other = layer.mlp.gate.weight.data[:2].clone()
        layer.mlp.gate.weight.data = torch.stack([one, -one, other, -other, 0 * one, 0 * one])  # two are above zero
    model.save_pretrained(folder / "model")
    make_tokens(folder / "tokens.npy")
    return folder


@pytest.mark.parametrize("method", ["sparsegpt", "wanda"])
def test_experts_that_see_no_token_are_pruned_as_the_others(method, mixture):
    result = run(mixture, method, sparsity=0.5, method=method, allocation="owl", outlier_m=3.0, replicas=2)
    facts = {(one.layer, one.name): one for one in result.sparsity.projections}
    for layer in range(2):
        counts = [facts[layer, f"mlp.experts.{expert}.up_proj"].tokens for expert in range(6)]
        assert counts[4:] == [0, 0]
        assert sum(counts) == 2 * 12 * 24  # two experts for each token
        assert facts[layer, "self_attn.q_proj"].tokens is None
    assert sum(one.outliers for one in facts.values()) > 0
    tensors = load_tensors(mixture / method)
    for name in (f"model.layers.{layer}.mlp.experts.{e}" for layer in range(2) for e in range(6)):
        for part in ("gate_proj", "up_proj", "down_proj"):
            share = float((tensors[f"{name}.{part}.weight"] == 0).float().mean())
            assert abs(share - facts[int(name.split(".")[2]), f"{name.split('.', 3)[3]}.{part}"].achieved) < 1e-9
            assert 0.2 < share < 0.8
    if method == "sparsegpt":
        assert facts[0, "mlp.experts.4.down_proj"].damping == 0.1
        assert facts[0, "mlp.experts.4.up_proj"].damping == 0.01


def test_masks_and_weights_of_experts_are_improved_as_those_of_others(mixture):
    result = run(mixture, "improved", sparsity=0.5, rebuild="barber", rebuild_threshold=0.5, reconstruct=2)
    blocks = result.sparsity.blocks
    assert {block.block for block in blocks} == {"attention", "mlp"}
    assert all(block.error_after <= block.error_before for block in blocks)
    assert any(block.swaps for block in blocks if block.block == "mlp")
    assert result.sparsity.achieved == pytest.approx(0.5, abs=1e-3)


def test_damping_is_measured_for_experts_that_see_no_token_and_parts_may_be_ignored(mixture):
    result = run(mixture, "damped", sparsity=0.5, damping="auto", ignore=("*.gate_proj", "*.up_proj"))
    assert all(one.damping for one in result.sparsity.projections)
    assert {one.name.rsplit(".", 1)[1] for one in result.sparsity.projections if one.tokens is not None} == {
        "down_proj"
    }
    assert result.sparsity.achieved == pytest.approx(0.5, abs=1e-3)


@pytest.mark.parametrize(
    "layout", [{}, {"shards": 2, "weights": "streamed"}, {"replicas": 2}], ids=["one", "streamed", "replicas"]
)
def test_windows_that_are_held_out_do_not_change_outlier_ratios(mixture, tmp_path, layout):
    """All windows are observed: what all tokens add to an expert's sums is that of all of them."""
    found = []
    for name, fields in (("all", {}), ("held-out", {"refit": True})):
        result = run(mixture, tmp_path / name, sparsity=0.5, allocation="mosaic", outlier_m=3.0, **fields, **layout)
        found.append([(one.layer, one.name, one.outliers, one.target) for one in result.sparsity.projections])
    assert found[0] == found[1]
    assert any(".experts." in name for _, name, *_ in found[0])


def noted(module, seen, name, hidden, chosen, weights):
    """The output of a Qwen3-MoE's experts, with the inputs and outputs of each part as `seen`, plainly."""
    total = torch.zeros_like(hidden)
    for expert, (both, down) in enumerate(zip(module.gate_up_proj, module.down_proj, strict=True)):
        rows, choices = torch.where(chosen == expert)
        inputs, outputs = hidden[rows], {}
        for part, weight in zip(("gate_proj", "up_proj"), both.detach().chunk(2), strict=True):
            outputs[part] = inputs @ weight.t()
            seen[(*name, f"mlp.experts.{expert}.{part}")] = (inputs, outputs[part], weight, hidden)
        neurons = torch.nn.functional.silu(outputs["gate_proj"]) * outputs["up_proj"]
        output = neurons @ down.detach().t()
        seen[(*name, f"mlp.experts.{expert}.down_proj")] = (neurons, output, down.detach(), None)
        total = total.index_add(0, rows, output * weights[rows, choices].unsqueeze(1))
    return total


def curves_by_definition(folder, count):
    """The error curves of all experts, without and with what is added for few tokens: by the first `count` windows and
    the whole dense model, forward and backward by autograd in one piece."""
    whole = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32).eval()
    windows = torch.from_numpy(np.load(folder / "tokens.npy"))[:count]
    seen, count = {}, windows.numel()
    for index, layer in enumerate(whole.model.layers):
        layer.mlp.experts.forward = functools.partial(noted, layer.mlp.experts, seen, (index,))
    logits = whole(windows).logits.flatten(0, 1)
    uniform = draws(LABEL_SEED, range(len(windows)), windows.shape[1])
    labels = drawn_tokens(logits.detach(), 1.0, uniform.flatten())
    loss = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
    gradients = torch.autograd.grad(loss, [output for _, output, _, _ in seen.values()])
    found = {}
    for (place, (inputs, _, weight, common)), gradient in zip(seen.items(), gradients, strict=True):
        tokens, squares = len(inputs), gradient.double().square().sum(0)
        gram = inputs.detach().t() @ inputs.detach()
        if common is not None:
            gram += common.detach().t() @ common.detach() * (PRIOR_TOKENS / count)
            tokens += PRIOR_TOKENS
        damping = 0.1 if common is None and tokens < 2 * len(gram) else 0.01
        statistics = InputStatistics("gram", gram, len(windows))
        some = weight[::ROWS]
        found[place] = []
        for level in (0.5, 0.6, 0.7, 0.8, 0.9):
            (solution,) = prune_together([Target(some, Unstructured(), level, damping)], statistics)
            change = (some - solution.weight).double()
            lost = ((change @ gram.double() / max(1, tokens)) * change).sum(1) @ squares[::ROWS] / count
            found[place].append(float(lost) * len(weight) / len(some) / 2)
    own = {place: list(errors) for place, errors in found.items()}
    for (layer, name), errors in found.items():
        alike = [own[layer, f"mlp.experts.{expert}.{name.rsplit('.')[-1]}"] for expert in range(6)]
        # 128 tokens at the mean error of a token at any of the experts, two of which got each token.
        added = [sum(level) / (count * 2) * PRIOR_TOKENS for level in zip(*alike, strict=True)]
        found[layer, name] = [error + more for error, more in zip(errors, added, strict=True)]
    return own, found


def test_error_curves_of_experts_are_those_of_the_definition(mixture, monkeypatch):
    monkeypatch.setattr("shardprune.solvers.error_curves.TOKENS", 5 * 24)  # of 12 windows
    fields = {"sparsity": 0.7, "allocation": "fisher"}
    result = run(mixture, "curves", **fields)
    own, expected = curves_by_definition(mixture, 5)
    shares = {(share["layer"], share["name"]): share for share in allocation_of(mixture / "curves")}
    assert sum(".experts." in name for _, name in shares) == len(expected) == 2 * 6 * 3
    for place, errors in expected.items():
        assert [error for _, error in shares[place]["curve"]] == pytest.approx(errors, rel=1e-3), place
    for layer, name in expected:
        if name.split(".")[2] in "45":  # which see no token, and cost something nevertheless
            assert max(own[layer, name]) == 0 < min(expected[layer, name])
    assert len({report.target for report in result.sparsity.projections}) > 5
    assert result.sparsity.allocated == pytest.approx(0.7, abs=1e-9)

    run(mixture, "curves-sharded", shards=2, weights="streamed", wave=4, **fields)
    assert differing(mixture / "curves", mixture / "curves-sharded") == []
    assert allocation_of(mixture / "curves-sharded") == allocation_of(mixture / "curves")
    run(mixture, "curves-replicas", replicas=6, **fields)  # of which one has no window
    for share in allocation_of(mixture / "curves-replicas"):
        expected_curve = shares[share["layer"], share["name"]]["curve"]
        assert share["curve"] == [pytest.approx(point, rel=1e-3) for point in expected_curve]


def allocation_of(out):
    return json.loads((out / "allocation.json").read_text())["projections"]


def test_what_is_not_known_of_experts_is_refused_in_one_line(mixture):
    for fields in ({"structured": 0.3}, {"sparsity": 0.5, "targets": "stream"}):
        with pytest.raises(InputError, match="are not known, only those of"):
            run(mixture, "refused", **fields)
    assert not (mixture / "refused").exists()
