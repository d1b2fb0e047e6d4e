"""Runs that merge experts, against transformers' own models whose experts are averaged."""

import json
import re

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from shardprune.commands.check import check
from shardprune.errors import InputError
from shardprune.report.page.experts_map import experts_map, lost_weight
from shardprune.report.summary import what_was_done
from shardprune.shard.forward_worker import ForwardWorker
from shardprune.storage.journal import Journal
from shardprune.storage.json_file import dump_json
from shardprune.storage.sealed_json import sealed_fields, unsealed
from tests.commands.expert_runs import GROUPED, WAVE, load, material, remove
from tests.commands.test_experts import mixtures_of
from tests.solvers.test_expert_merging import joined
from tests.support.tiny import differing, load_tensors

ARCHITECTURES = ("qwen3_moe", "deepseek_v3", "gpt_oss", "nemotron_h")  # of the last two: biases, experts without gates


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    """A folder with a Qwen3-MoE of six experts in both of its layers."""
    return material(tmp_path_factory.mktemp("mixture"), "qwen3_moe")


def mean_outputs(model, windows):
    """The mean output [experts, hidden] of every expert of each layer over all tokens that enter its mixture."""
    sums = []
    for module in mixtures_of(model):
        count = module.down_proj.shape[0]
        own = []
        sums.append(own)

        def add(_module, given, own=own, count=count, forward=module.forward):
            hidden = given[0]
            alone = torch.ones(len(hidden), 1)
            each = [forward(hidden, torch.full((len(hidden), 1), one), alone).double().sum(0) for one in range(count)]
            own.append(torch.stack(each))

        module.register_forward_pre_hook(add)
    with torch.no_grad():
        for wave in windows.split(WAVE):
            model(wave, use_cache=False)
    return [sum(own) / windows.numel() for own in sums]


def merged(dense, small, layers):
    """The tensors of a dense model whose experts were merged: their own are averages, others have the rows of those
    that stayed."""
    inside = {f"{name}.": place for place, name in enumerate(paths_of(dense))}
    found = {}
    for name, tensor in dense.state_dict().items():
        own = next((place for path, place in inside.items() if name.startswith(path)), None)
        after = small.state_dict()[name]
        if own is not None:
            tokens, parts = torch.tensor(layers[own].tokens).double(), []
            for members in layers[own].members:
                weights = tokens[members].reshape(-1, *[1] * (tensor.dim() - 1))
                mean = (tensor[members].double() * weights).sum(0) / weights.sum()
                parts.append(mean.float() if len(members) > 1 else tensor[members[0]])
            found[name] = torch.stack(parts)
        elif after.shape != tensor.shape:
            (dim,) = (d for d, sizes in enumerate(zip(tensor.shape, after.shape, strict=True)) if len({*sizes}) > 1)
            layer = next(int(part) for part in name.split(".") if part.isdigit())
            kept = next(one.kept for one in layers if one.layer == layer)
            found[name] = tensor.index_select(dim, torch.tensor(kept))
        else:
            found[name] = tensor
    return found


def paths_of(model):
    modules = mixtures_of(model)
    return [name for name, module in model.named_modules() if any(module is one for one in modules)]


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_experts_whose_outputs_are_alike_become_their_average(model_type, tmp_path):
    folder = material(tmp_path, model_type)
    windows = torch.from_numpy(np.load(folder / "tokens.npy"))
    result = remove(folder, "out", keep=4 if model_type in GROUPED else 3, merge=True, protect=False)
    dense, small, layers = load(folder / "model"), load(folder / "out"), result.experts.layers
    outputs = mean_outputs(dense, windows)
    for layer, means in zip(layers, outputs, strict=True):
        size = len(means) // (2 if model_type in GROUPED else 1)
        groups = [range(start, start + size) for start in range(0, len(means), size)]
        expected = [members for group in groups for members in joined(means, group, len(layer.kept) // len(groups))]
        assert sorted(map(tuple, layer.members)) == sorted(expected)
        assert [max(members, key=lambda one: layer.scores[one]) for members in layer.members] == layer.kept
        assert layer.lost is None
    assert any(len(members) > 1 for layer in layers for members in layer.members)
    wrong = {
        name for name, own in merged(dense, small, layers).items() if not torch.equal(own, small.state_dict()[name])
    }
    assert not wrong
    assert [verdict.faults for verdict in check(str(folder / "out"))] == [[]]


def test_on_any_workers_and_from_statistics_it_is_the_same(mixture, tmp_path, monkeypatch):
    single = remove(mixture, tmp_path / "single", keep=3, merge=True)
    for out, changed in (
        ("sharded", {"shards": 2}),
        ("streamed", {"shards": 2, "weights": "streamed"}),
        ("replicated", {"replicas": 3, "weights": "streamed"}),
    ):
        result = remove(mixture, tmp_path / out, keep=3, merge=True, **changed)
        assert differing(tmp_path / "single", tmp_path / out) == []
        assert [one.members for one in result.experts.layers] == [one.members for one in single.experts.layers]
        known = [json.loads((tmp_path / name / "experts.json").read_text()) for name in ("single", out)]
        if "replicas" not in changed:
            assert known[0] == known[1]
        for layer, own in known[0]["distances"].items():
            assert own == pytest.approx(known[1]["distances"][layer], rel=1e-6)
    direct = remove(mixture, tmp_path / "direct", keep=4, merge=True, score="frequency")
    plain = remove(mixture, tmp_path / "plain", keep=4)
    monkeypatch.setattr(ForwardWorker, "embed", None)  # no second pass
    given = {"keep": 4, "statistics": str(tmp_path / "single"), "calibration": ("c4",)}
    again = remove(mixture, tmp_path / "again", merge=True, score="frequency", **given)
    assert differing(tmp_path / "direct", tmp_path / "again") == []
    assert again.experts == direct.experts
    assert remove(mixture, tmp_path / "removed", **given).experts == plain.experts
    assert differing(tmp_path / "plain", tmp_path / "removed") == []
    with pytest.raises(InputError, match="^statistics: .* has no distances between outputs; give that of a run with m"):
        remove(mixture, tmp_path / "refused", merge=True, **given | {"statistics": str(tmp_path / "plain")})
    assert not (tmp_path / "refused").exists()


def test_what_was_merged_is_trained_and_layers_may_see_those_behind_which_they_come(mixture, tmp_path):
    fields = {"keep": 3, "merge": True, "router_kd": 6, "reconstruct": 6, "propagate": "pruned"}
    result = remove(mixture, tmp_path / "out", **fields)
    plain = remove(mixture, tmp_path / "plain", keep=3, merge=True, protect=False)
    first, second = result.experts.layers
    assert first.members == plain.experts.layers[0].members
    assert second.scores != plain.experts.layers[1].scores
    for layer in result.experts.layers:
        assert [one.step for one in layer.trained] == ["router", "reconstruction"]
        assert layer.trained[-1].error_before <= layer.trained[0].error_before
    changed = set(differing(tmp_path / "plain", tmp_path / "out"))
    assert any(".experts." in name for name in changed)
    remove(mixture, tmp_path / "streamed", shards=2, weights="streamed", **fields)
    assert differing(tmp_path / "out", tmp_path / "streamed") == []


def test_the_report_and_the_record_say_which_expert_went_where(mixture, tmp_path):
    result = remove(mixture, tmp_path / "out", keep=3, merge=True)
    drawn = experts_map(result.experts).figure.data[0]
    for words, layer in zip(drawn.customdata, result.experts.layers, strict=True):
        for kept, members in zip(layer.kept, layer.members, strict=True):
            for expert in members:
                others = ", ".join(str(one) for one in members if one != expert)
                said = f"merged with {others} into {kept}" if others else "stayed"
                assert words[expert].startswith(f"{said}, score")
    assert lost_weight(result.experts) is None
    assert what_was_done(result) == ["3 of 6 experts by reap, merged"]
    records = Journal(str(tmp_path / "out"), result.fingerprint, 2).finished()
    for layer in result.experts.layers:
        own = records[layer.layer].experts
        assert [list(members) for members in own.members] == layer.members
        assert [list(ws) for ws in own.weights] == [[layer.tokens[one] for one in ms] for ms in layer.members]


def test_experts_without_tokens_count_alike(tmp_path):
    folder = material(tmp_path, "qwen3_moe")
    file = folder / "model" / "model.safetensors"
    tensors = load_file(file)
    gate = tensors["model.layers.1.mlp.gate.weight"]
    gate[2:] = 0
    gate[:2] = torch.stack([gate[0], -gate[0]])
    gate[1:3] = torch.stack([-gate[0], gate[0] / 2])
    save_file(tensors, file, {"format": "pt"})
    result = remove(folder, "out", keep=2, merge=True, protect=False)
    layer, after = result.experts.layers[1], load_tensors(folder / "out")
    unseen = [expert for expert, count in enumerate(layer.tokens) if not count]
    assert len(unseen) >= 2
    for place, members in enumerate(layer.members):
        weights = [layer.tokens[one] for one in members]
        weights = weights if any(weights) else [1] * len(members)
        name = "model.layers.1.mlp.experts.{}.down_proj.weight"
        parts = [weight * tensors[name.format(one)].double() for one, weight in zip(members, weights, strict=True)]
        assert torch.equal(after[name.format(place)], (sum(parts) / sum(weights)).float())


@pytest.mark.parametrize("stacked", [False, True])
def test_layers_that_predict_further_tokens_merge_the_experts_of_the_last_layer(stacked, tmp_path):
    folder = material(tmp_path, "qwen3_next")
    file = folder / "model" / "model.safetensors"
    tensors, draw = load_file(file), torch.Generator().manual_seed(1)
    further = {
        name.replace("model.layers.1.", "mtp.layers.0."): torch.randn(tensor.shape, generator=draw)
        for name, tensor in tensors.items()
        if name.startswith("model.layers.1.")
    }
    path, leaf = "mtp.layers.0.mlp.experts", "down_proj"
    down = torch.stack([further[f"{path}.{expert}.{leaf}.weight"] for expert in range(4)])
    if stacked:
        further = {name: tensor for name, tensor in further.items() if not re.search(r"experts\.\d", name)}
        further[f"{path}.{leaf}"] = down
    save_file({**tensors, **further}, file, {"format": "pt"})
    layer = remove(folder, "out", keep=2, merge=True).experts.layers[-1]
    after = load_tensors(folder / "out")
    weights = torch.tensor(layer.tokens).double()
    expected = torch.stack(
        [(weights[own, None, None] * down[own].double()).sum(0) / weights[own].sum() for own in layer.members]
    ).float()
    found = torch.stack([after[f"{path}.{place}.{leaf}.weight"] for place in range(2)]) if not stacked else None
    assert torch.equal(after[f"{path}.{leaf}"] if stacked else found, expected)
    assert torch.equal(after["mtp.layers.0.mlp.gate.weight"], further["mtp.layers.0.mlp.gate.weight"][layer.kept])
    assert {name for name in after if name.startswith(path)} == (
        {f"{path}.{leaf}"} if stacked else {name for name in further if re.match(rf"{re.escape(path)}\.[01]\.", name)}
    )


def test_damaged_distances_are_refused(mixture, tmp_path):
    remove(mixture, tmp_path / "out", keep=3, merge=True)
    file = tmp_path / "out" / "experts.json"
    content = unsealed(json.loads(file.read_text()))
    given = {"keep": 4, "merge": True, "statistics": str(tmp_path / "out"), "calibration": ("c4",)}
    for change in (lambda own: own[:-1], lambda own: [-1.0, *own[1:]]):
        content["distances"] = {layer: change(own) for layer, own in content["distances"].items()}
        file.write_text(dump_json(sealed_fields(content)))
        with pytest.raises(InputError, match="^statistics: .* has no distances between the 6 experts of every layer"):
            remove(mixture, tmp_path / "refused", **given)
