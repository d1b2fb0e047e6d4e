"""Projections that are left dense because a recipe says so."""

import pytest
import torch

from shardprune.commands.check import check
from shardprune.errors import InputError
from shardprune.planning.plan import plan
from shardprune.planning.recipe import PlanRecipe
from shardprune.report.progress import Reporter
from tests.support.running import run
from tests.support.tiny import differing, load_tensors, make_model, make_tokens

IGNORED = ("model.layers.0.*", "*.down_proj")
LAYERS = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ignore")
    make_model(folder / "model")
    make_tokens(folder / "tokens.npy")
    return folder


def left_alone(name: str) -> bool:
    return ".layers." not in name or ".layers.0." in name or ".down_proj." in name or "norm" in name


@pytest.mark.parametrize(
    "fields",
    [
        {"sparsity": 0.5},
        {"sparsity": 0.6, "method": "wanda", "allocation": "owl"},
        {"sparsity": 0.6, "method": "wanda", "allocation": "mosaic"},
        {"sparsity": 0.6, "method": "wanda", "allocation": "mosaic-released"},
        {"sparsity": 0.6, "method": "wanda", "allocation": "fisher"},
        {"sparsity": 0.5, "method": "wanda", "pattern": "mixed:8"},
        {"sparsity": 0.5, "rebuild": "barber", "rebuild_threshold": 0.5},
        {"sparsity": 0.5, "targets": "stream"},
        {"sparsity": 0.5, "reconstruct": 2},
        {"pattern": "2:4", "method": "magnitude"},
    ],
    ids=lambda fields: "-".join(map(str, fields.values())),
)
def test_what_is_ignored_stays_as_it_is_and_the_target_is_the_others(folder, tmp_path, fields):
    result = run(folder, tmp_path / "out", ignore=IGNORED, **fields)
    before, after = load_tensors(folder / "model"), load_tensors(tmp_path / "out")
    assert {name for name in before if torch.equal(before[name], after[name])} == set(filter(left_alone, before))
    pruned = [tensor for name, tensor in after.items() if not left_alone(name)]
    zeros, weights = (
        sum(counts) for counts in zip(*((int((one == 0).sum()), one.numel()) for one in pruned), strict=True)
    )
    assert zeros / weights == pytest.approx(result.sparsity.achieved, abs=1e-6)
    if fields.get("allocation") != "mosaic-released":
        assert result.sparsity.achieved == pytest.approx(fields.get("sparsity", 0.5), abs=2e-3)
    assert [layer.layer for layer in result.sparsity.layers] == [1, 2, 3]
    assert len(result.sparsity.projections) == len(pruned) == 3 * 6
    assert [verdict.faults for verdict in check(str(tmp_path / "out"))] == [[]]


def test_layers_of_different_sizes_have_n_of_m_whose_mean_is_near_the_target(folder, tmp_path):
    """Half of what one of 8 in the largest layer makes is as near as they come."""
    half = {"sparsity": 0.5, "method": "wanda", "pattern": "mixed:8"}
    result = run(folder, tmp_path / "out", ignore=("model.layers.0.mlp.*",), **half)
    before, sizes = load_tensors(folder / "model"), [0] * LAYERS
    for one in result.sparsity.projections:
        sizes[one.layer] += before[f"model.layers.{one.layer}.{one.name}.weight"].numel()
    assert sizes[0] < sizes[1]
    assert abs(result.sparsity.achieved - 0.5) <= max(sizes) / 16 / sum(sizes)
    patterns = [{one.pattern for one in result.sparsity.projections if one.layer == layer} for layer in range(LAYERS)]
    assert all(len(one) == 1 for one in patterns)
    assert [verdict.faults for verdict in check(str(tmp_path / "out"))] == [[]]


def test_the_run_says_so_and_others_share_nothing_with_it(folder, tmp_path, capsys):
    run(folder, tmp_path / "out", reporter=Reporter(), sparsity=0.5, ignore=IGNORED)
    said = " ".join(capsys.readouterr().err.split())
    assert "left dense: 10 of 28 projections (ignored; the target is the others')" in said
    with pytest.raises(InputError, match="^out: .*another run"):
        run(folder, tmp_path / "out", sparsity=0.5)


@pytest.mark.parametrize("fields", [{}, {"reconstruct": 2}], ids=["plain", "reconstruct"])
def test_shards_and_streamed_weights_equal_one_worker(folder, tmp_path, fields):
    run(folder, tmp_path / "one", sparsity=0.5, ignore=IGNORED, **fields)
    run(folder, tmp_path / "two", sparsity=0.5, ignore=IGNORED, shards=2, weights="streamed", **fields)
    assert differing(tmp_path / "one", tmp_path / "two") == []


@pytest.mark.parametrize(
    ("globs", "problem"),
    [
        (("*.down",), "'*.down' matches no projection; their names are such as model.layers.0.self_attn.q_proj"),
        (("*",), "leaves nothing to prune; ignore fewer projections"),
        (("",), "String should have at least 1 character"),
    ],
)
def test_what_cannot_be_ignored_is_one_line(folder, tmp_path, globs, problem):
    with pytest.raises(InputError) as caught:
        run(folder, tmp_path / "out", sparsity=0.5, ignore=globs)
    assert caught.value.field.startswith("ignore")
    assert problem in caught.value.problem
    assert not (tmp_path / "out").exists()


def test_a_plan_does_not_pay_for_what_is_ignored(folder):
    def seconds(**fields):
        values = {"model": str(folder / "model"), "hardware": "cpu", "samples": 12, "seqlen": 24, **fields}
        return plan(PlanRecipe.checked(values)).plans[0].candidate.seconds.prune

    assert seconds(ignore=["*.mlp.*"]) < seconds()
    for fields in ({}, {"targets": "stream"}, {"reconstruct": 2, "replicas": 2, "gpus": 2}):
        assert seconds(ignore=["model.layers.0.*"], **fields) < seconds(**fields)
