"""Runs whose projections give up different shares: outlier ratios on shards, allocations, mixed N:M."""

import json

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from shardprune.commands import prune as story
from shardprune.errors import InputError
from shardprune.solvers.allocation.allocations import ALLOCATIONS
from shardprune.solvers.pattern import NM
from tests.support.running import run
from tests.support.tiny import CONFIGS, differing, load_tensors, make_model, make_tokens

OBSERVING = [name for name, allocation in ALLOCATIONS.items() if allocation.observes]
M, SPREAD = 3.0, 0.1


def whole_model_metrics(folder) -> list[dict[str, torch.Tensor]]:
    """Every projection's Wanda metric, from the dense model run as one."""
    model = AutoModelForCausalLM.from_pretrained(folder / "model", attn_implementation="sdpa").eval()
    sums: dict = {}

    def note(module, inputs):
        sums[module] = sums.get(module, 0) + inputs[0].double().flatten(0, 1).square().sum(0)

    linears = [
        {name: part for name, part in layer.named_modules() if isinstance(part, torch.nn.Linear)}
        for layer in model.model.layers
    ]
    for layer in linears:
        for linear in layer.values():
            linear.register_forward_pre_hook(note)
    tokens = torch.from_numpy(np.load(folder / "tokens.npy"))
    with torch.no_grad():
        model(tokens)
    return [
        {
            name: linear.weight.data.double().abs() * (sums[linear] / len(tokens)).sqrt()
            for name, linear in layer.items()
        }
        for layer in linears
    ]


def percentage(entries: torch.Tensor) -> float:
    return 100 * float((entries > M * entries.mean()).double().mean())


def scaled(values) -> np.ndarray:
    values = np.array(values)
    return (values - values.min()) / (values.max() - values.min()) * 2 * SPREAD


@pytest.mark.parametrize("allocation", OBSERVING)
def test_sparsities_are_those_of_the_plain_formulation(folder, allocation, tmp_path):
    target = 0.6
    fields = {"allocation": allocation, "outlier_m": M, "outlier_lambda": SPREAD, "sparsity": target}
    result = run(folder, tmp_path / "o", method="wanda", shards=2, **fields)

    metrics = whole_model_metrics(folder)
    of_layers = [percentage(torch.cat([entries.flatten() for entries in layer.values()])) for layer in metrics]
    own = [{name: percentage(entries) for name, entries in layer.items()} for layer in metrics]
    sizes = {name: entries.numel() for name, entries in metrics[0].items()}
    if allocation == "owl":
        density = scaled(of_layers)
        density = density - density.mean() + 1 - target
        expected = [dict.fromkeys(sizes, 1 - value) for value in density]
    elif allocation == "mosaic":
        flat = scaled([layer[name] for layer in own for name in sizes]).reshape(len(own), len(sizes))
        weights = np.array(list(sizes.values()))
        centre = (flat * weights).sum() / (weights.sum() * len(own))
        expected = [dict(zip(sizes, 1 - (row - centre + 1 - target), strict=True)) for row in flat]
    else:
        means = {name: scaled([layer[name] for layer in own]).mean() for name in sizes}
        expected = [
            {name: max(1 - (value - means[name] + 1 - target), 0.01) for name in sizes} for value in scaled(of_layers)
        ]

    assert len(result.sparsity.projections) == 4 * 7
    for report in result.sparsity.projections:
        assert report.target == pytest.approx(expected[report.layer][report.name], abs=1e-6)
        assert report.outliers == pytest.approx(own[report.layer][report.name], abs=1e-6)
        assert report.achieved == pytest.approx(report.target, abs=0.5 / sizes[report.name] + 1e-12)
    assert [layer.outliers for layer in result.sparsity.layers] == pytest.approx(of_layers, abs=1e-6)
    assert len({report.target for report in result.sparsity.projections}) >= 4


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt", "alps"])
@pytest.mark.parametrize("allocation", OBSERVING)
def test_the_target_is_met_to_a_weight_per_projection(folder, allocation, method, tmp_path):
    result = run(folder, tmp_path / "o", method=method, allocation=allocation, sparsity=0.7, outlier_m=M)
    tensors = load_tensors(tmp_path / "o")
    names = [f"model.layers.{report.layer}.{report.name}.weight" for report in result.sparsity.projections]
    zeros, weights = (
        sum(int(count(tensors[name])) for name in names) for count in (lambda t: (t == 0).sum(), torch.numel)
    )
    assert result.sparsity.achieved == zeros / weights
    assert result.sparsity.target == 0.7
    if allocation == "mosaic-released":
        assert result.sparsity.allocated == pytest.approx(result.sparsity.achieved, abs=28 / weights)
        assert abs(result.sparsity.allocated - 0.7) > 1e-3
    else:
        assert result.sparsity.allocated == pytest.approx(0.7, abs=1e-9)
        assert abs(zeros - 0.7 * weights) <= 28


LAYOUTS = [
    {"shards": 3},
    {"weights": "streamed"},
    {"weights": "streamed", "shards": 2},
    {"activations": "device", "measure_error": False},
]


@pytest.mark.parametrize("fields", LAYOUTS, ids=str)
def test_layout_and_memory_do_not_change_a_bit(folder, fields, tmp_path):
    same = {"method": "wanda", "allocation": "mosaic", "outlier_m": M, "sparsity": 0.6}
    plain = run(folder, tmp_path / "plain", **same)
    other = run(folder, tmp_path / "other", **same, **fields)
    assert differing(tmp_path / "plain", tmp_path / "other") == []
    assert other.sparsity.layers == plain.sparsity.layers


@pytest.mark.parametrize("fields", [{"replicas": 3}, {"replicas": 2, "shards": 2, "weights": "streamed"}], ids=str)
def test_replicas_change_only_the_order_of_sums(folder, fields, tmp_path):
    same = {"allocation": "owl", "outlier_m": M, "sparsity": 0.6}
    one = run(folder, tmp_path / "one", **same).sparsity
    several = run(folder, tmp_path / "several", **same, **fields).sparsity
    assert [layer.outliers for layer in several.layers] == [layer.outliers for layer in one.layers]
    first, second = load_tensors(tmp_path / "one"), load_tensors(tmp_path / "several")
    for name in first:
        assert torch.equal(first[name] == 0, second[name] == 0), name
        # The rounding of a layer's sums is magnified in the layers after it, by how much depends on the processor.
        assert torch.allclose(first[name], second[name], rtol=1e-3, atol=1e-4), name


def test_segments_share_one_allocation(folder, tmp_path):
    """Ratios are those of the dense model, whatever the propagation; and one pass is enough for both."""
    same = {"allocation": "owl", "outlier_m": M, "sparsity": 0.6}
    exact = run(folder, tmp_path / "exact", **same)
    parallel = run(folder, tmp_path / "parallel", propagation="parallel", shards=2, **same)
    run(folder, tmp_path / "streamed", propagation="parallel", shards=2, weights="streamed", **same)
    assert parallel.sparsity.layers == exact.sparsity.layers
    assert differing(tmp_path / "parallel", tmp_path / "streamed") == []
    changed = {name.split(".")[2] for name in differing(tmp_path / "exact", tmp_path / "parallel")}
    assert changed == {"2", "3"}


@pytest.mark.parametrize("fields", [{}, {"propagation": "parallel", "shards": 2}], ids=str)
def test_ratios_are_not_taken_again_after_an_interruption(folder, fields, dies_at_layer, tmp_path, monkeypatch):
    fields = {"allocation": "owl", "outlier_m": M, "sparsity": 0.6, **fields}
    undisturbed = run(folder, tmp_path / "plain", **fields)
    dies_at_layer(3)
    with pytest.raises(KeyboardInterrupt):
        run(folder, tmp_path / "cut", **fields)
    kept = json.loads((tmp_path / "cut" / "run.json").read_text())["outliers"]
    assert [layer["layer"] for layer in kept] == [layer.outliers for layer in undisturbed.sparsity.layers]
    asked = []
    observe = story.observe

    def noted(group, layout, waves, observation, *rest):
        asked.append(observation)
        return observe(group, layout, waves, observation, *rest)

    monkeypatch.setattr(story, "observe", noted)
    resumed = run(folder, tmp_path / "cut", **fields)
    assert differing(tmp_path / "plain", tmp_path / "cut") == []
    assert resumed.sparsity == undisturbed.sparsity
    assert all(observation.outlier_m is None for observation in asked)
    assert len(asked) == (1 if "shards" in fields else 0)


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt", "alps"])
def test_mixed_patterns(folder, method, tmp_path):
    fields = {"pattern": "mixed:8", "sparsity": 0.5, "outlier_lambda": 0.3, "outlier_m": M}
    result = run(folder, tmp_path / "o", method=method, **fields)
    assert result.recipe["allocation"] == "owl"
    tensors = load_tensors(tmp_path / "o")
    counts = {}
    for report in result.sparsity.projections:
        n = round(8 * (1 - report.target))
        assert report.pattern == f"{n}:8"
        weight = tensors[f"model.layers.{report.layer}.{report.name}.weight"]
        assert NM(n, 8).holds(weight)
        assert report.achieved == 1 - n / 8
        counts.setdefault(report.layer, set()).add(n)
    assert all(len(found) == 1 for found in counts.values())
    assert len(set.union(*counts.values())) > 1
    assert result.sparsity.achieved == 0.5
    ratios = [layer.outliers for layer in result.sparsity.layers]
    order = sorted(range(4), key=lambda layer: ratios[layer])
    assert [result.sparsity.layers[layer].achieved for layer in order] == sorted(
        (layer.achieved for layer in result.sparsity.layers), reverse=True
    )


@pytest.mark.parametrize("family", CONFIGS)
def test_every_family(family, tmp_path):
    make_model(tmp_path / "model", family)
    make_tokens(tmp_path / "tokens.npy")
    fields = {"allocation": "mosaic", "outlier_m": M, "sparsity": 0.5, "rebuild": "barber", "rebuild_threshold": 0.3}
    single = run(tmp_path, "single", **fields)
    sharded = run(tmp_path, "sharded", shards=2, weights="streamed", **fields)
    assert differing(tmp_path / "single", tmp_path / "sharded") == []
    assert single.sparsity == sharded.sparsity
    assert single.sparsity.achieved == pytest.approx(0.5, abs=1e-3)
    assert all(block.swaps > 0 for block in single.sparsity.blocks)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "single")


def test_wandas_variant(folder, tmp_path):
    plain = run(folder, tmp_path / "plain", method="wanda", sparsity=0.6)
    variant = run(folder, tmp_path / "variant", method="wanda", sparsity=0.6, wanda_variant=True)
    assert [report.achieved for report in variant.sparsity.projections] == [
        report.achieved for report in plain.sparsity.projections
    ]
    rows = (load_tensors(tmp_path / "variant")["model.layers.0.mlp.up_proj.weight"] == 0).sum(1)
    assert len(set(rows.tolist())) > 3


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"pattern": "mixed:8", "sparsity": 0.7},
            "sparsity: 0.7 does not fit the pattern mixed:8: N of 8 over 4 layers",
        ),
        (
            {"pattern": "mixed:5", "sparsity": 0.6},
            "pattern: mixed:5 does not fit self_attn.q_proj, which has 32 inputs",
        ),
        ({"allocation": "owl", "sparsity": 0.995}, "sparsity: 0.995 leaves owl no room"),
    ],
)
def test_bad_input_leaves_no_output(folder, fields, message, tmp_path):
    with pytest.raises(InputError, match=message):
        run(folder, tmp_path / "o", **fields)
    assert not (tmp_path / "o").exists()
