"""Runs whose sparsity is shared out by error curves: the curves by definition, layouts, restarts, and what is kept."""

import functools
import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from shardprune.cluster.local_backend import LocalBackend
from shardprune.errors import InputError, SolverError, WorkerLost
from shardprune.shard.prune_worker import PruneWorker
from shardprune.solvers import error_curves
from shardprune.solvers.allocation.knapsack import share_out
from shardprune.solvers.error_curves import LABEL_SEED, ROWS
from shardprune.solvers.pattern import Unstructured
from shardprune.solvers.sampling import drawn_tokens, draws
from shardprune.solvers.sparsegpt import prune
from shardprune.solvers.statistics import InputStatistics
from tests.support.architectures import MIXED, make_architecture
from tests.support.running import run
from tests.support.tiny import differing, load_tensors, make_model, make_tokens

FISHER = {"allocation": "fisher", "sparsity": 0.7}


@pytest.fixture(scope="module")
def single(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("single") / "o"
    return out, run(folder, out, **FISHER)


def test_perplexity_is_added_to_a_run_that_wrote_its_own_text(folder, tmp_path):
    fields = {**FISHER, "calibration": "self", "samples": 8}
    run(folder, tmp_path / "o", **fields)
    before = load_tensors(tmp_path / "o")
    result = run(folder, tmp_path / "o", **fields, eval=(str(folder / "tokens.npy"),))
    assert [measured.windows for measured in result.perplexity.values()] == [12]
    after = load_tensors(tmp_path / "o")
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


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


def test_segments_have_one_allocation_and_other_methods_take_it(folder, single, tmp_path):
    """Curves are those of the dense model, whatever the propagation, and the zeros may be another method's."""
    run(folder, tmp_path / "o", method="wanda", shards=2, propagation="parallel", wave=4, **FISHER)
    assert content(tmp_path / "o") == content(single[0])


def dies_in(monkeypatch, verb, call, error):
    """Let the worker's verb end with an error when it is called for the nth time; return the calls so far."""
    method, calls = getattr(PruneWorker, verb), []

    @functools.wraps(method)
    def dying(self, *args):
        calls.append(args)
        if len(calls) == call:
            raise error
        return method(self, *args)

    monkeypatch.setattr(PruneWorker, verb, dying)
    return calls


@pytest.mark.parametrize(
    ("verb", "call", "fields"),
    [
        ("forward", 2, {}),
        ("draw_labels", 2, {"shards": 2}),
        ("backward", 3, {"shards": 2}),
        ("differentiate", 5, {"weights": "streamed"}),
        ("measure_curves", 6, {}),
        ("write", 2, {}),
    ],
)
def test_runs_that_lose_a_worker_end_in_the_same_tensors(folder, single, tmp_path, monkeypatch, verb, call, fields):
    calls = dies_in(monkeypatch, verb, call, WorkerLost("killed"))
    monkeypatch.setattr(LocalBackend, "replaces", True)
    monkeypatch.setattr(LocalBackend, "settle", LocalBackend.slots)
    assert run(folder, tmp_path / "o", **fields, **FISHER).restarts == 1
    assert len(calls) > call
    assert differing(single[0], tmp_path / "o") == []
    assert content(tmp_path / "o") == content(single[0])


def test_curves_are_not_measured_again_after_an_interruption(folder, single, tmp_path, monkeypatch):
    with monkeypatch.context() as cut:
        dies_in(cut, "write", 3, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            run(folder, tmp_path / "o", **FISHER)
    kept = json.loads((tmp_path / "o" / "run.json").read_text())["curves"]
    assert {(share["layer"], share["name"]): share["curve"] for share in kept} == curves(single[0])
    calls = dies_in(monkeypatch, "measure_curves", 1, AssertionError())
    run(folder, tmp_path / "o", **FISHER)
    assert calls == []
    assert differing(single[0], tmp_path / "o") == []
    assert content(tmp_path / "o") == content(single[0])


def test_what_a_run_leaves_is_taken_again_and_its_curves_shared_out_anew(folder, single, tmp_path):
    out, first = single
    file = str(out / "allocation.json")
    run(folder, tmp_path / "same", sparsity=0.7, allocation_file=file)
    assert differing(out, tmp_path / "same") == []
    other = run(folder, tmp_path / "other", sparsity=0.6, allocation_file=file)
    shares = {(report.layer, report.name): report.target for report in other.sparsity.projections}
    assert shares == share_out(curves(out), sizes_of(out), 0.6)
    with pytest.raises(InputError, match="^allocation_file: .*curves from 0.5 to 0.9 say nothing of a sparsity of 0.4"):
        run(folder, tmp_path / "far", sparsity=0.4, allocation_file=file)
    assert first.sparsity.target == 0.7


def test_a_run_measured_on_more_text_keeps_its_curves(folder, single, tmp_path):
    shutil.copytree(single[0], tmp_path / "o")
    run(folder, tmp_path / "o", eval=(str(folder / "tokens.npy"),), eval_windows=2, **FISHER)
    assert content(tmp_path / "o") == content(single[0])


@pytest.mark.parametrize("damping", [0.1, "auto"])
def test_curves_have_the_damping_of_the_run_and_no_window_that_is_held_out(folder, tmp_path, monkeypatch, damping):
    seen = []
    measured = error_curves.error_curves

    def noted(weights, inputs, gradients, levels, damping, tokens, behind):
        assert behind == tokens
        seen.append((damping, tokens))
        return measured(weights, inputs, gradients, levels, damping, tokens, behind)

    monkeypatch.setattr("shardprune.shard.error_curves.error_curves", noted)
    run(folder, tmp_path / "o", damping=damping, **FISHER)
    assert set(seen) == {(0.1, 12 * 24) if damping == 0.1 else (0.01, 8 * 24)}


def test_after_structures_are_gone_the_curves_are_those_of_what_is_left(folder, tmp_path):
    result = run(folder, tmp_path / "o", structured=0.2, **FISHER)
    assert result.sparsity.achieved == pytest.approx(0.7, abs=1e-3)
    assert len({report.target for report in result.sparsity.projections}) > 5


@pytest.mark.parametrize("family", ["opt-350m", "gemma2", "phi3"])
def test_other_families_and_precisions(family, tmp_path):
    make_model(tmp_path / "model", family, dtype=torch.float16)
    make_tokens(tmp_path / "tokens.npy")
    run(tmp_path, tmp_path / "o", **FISHER)
    errors = [error for curve in curves(tmp_path / "o").values() for _, error in curve]
    assert min(errors) >= 0  # zero where all that goes reads neurons that are never on
    assert 0 < max(errors) < float("inf")


def test_activations_that_overflow_are_a_line(folder, tmp_path):
    shutil.copytree(folder / "model", tmp_path / "model")
    tensors = load_tensors(tmp_path / "model")
    tensors["model.layers.2.post_attention_layernorm.weight"][3] = float("inf")
    save_file(tensors, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    with pytest.raises(SolverError, match="the model's logits are not finite"):
        run(folder, tmp_path / "o", model=tmp_path / "model", **FISHER)
    assert not list((tmp_path / "o").glob("model-*"))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"pattern": "2:4"}, "^allocation: 'fisher' needs a sparsity to share out; 2:4 gives every projection 0.5"),
        ({"pattern": "mixed:8", "sparsity": 0.5}, "^allocation: 'fisher' does not fit the pattern mixed:8; use owl"),
        ({"sparsity": 0.99}, "^sparsity: 0.99 leaves fisher no room, which takes at most 0.99 of any projection"),
        ({"sparsity": 0}, "^sparsity: 0.0 leaves fisher nothing to share out; use more"),
        ({"sparsity": 0.3, "structured": 0.3}, "^sparsity: 0.3 leaves fisher nothing to share out; use more"),
        ({"sparsity": 0.5, "outlier_lambda": 0.1}, "^outlier_lambda: 0.1 .*an allocation by outliers"),
        ({"sparsity": 0.5, "allocation_file": "a.json"}, "^allocation_file: 'a.json' does not go with allocation"),
    ],
)
def test_what_does_not_go_with_it_is_said(folder, tmp_path, fields, message):
    with pytest.raises(InputError, match=message) as wrong:
        run(folder, tmp_path / "o", allocation="fisher", **fields)
    assert "\n" not in str(wrong.value)
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("model_type", ["nemotron_h", "qwen3_5_text"])
def test_layers_of_several_kinds(model_type, tmp_path):
    make_architecture(tmp_path / "model", model_type, MIXED[model_type])
    make_tokens(tmp_path / "tokens.npy")
    run(tmp_path, tmp_path / "o", **FISHER)
    run(tmp_path, tmp_path / "sharded", shards=2, weights="streamed", **FISHER)
    assert differing(tmp_path / "o", tmp_path / "sharded") == []
    assert content(tmp_path / "o") == content(tmp_path / "sharded")
