"""Plans of runs that remove experts, beside these runs: the same calls of workers, wave by wave and layer by layer."""

import pytest

from shardprune import ExpertsRecipe, experts
from shardprune.cluster.layout import plan_layout
from shardprune.cluster.local_backend import LocalGroup
from shardprune.planning.costs import Costs, Places
from shardprune.planning.moments import Setup
from shardprune.planning.recipe import PlanRecipe
from shardprune.planning.simulation import SimulatedGroup, simulate
from shardprune.planning.workload import planned_task, read_model, with_fewer_experts
from shardprune.report.progress import Reporter
from tests.commands.expert_runs import SAMPLES, SEQLEN, WAVE, fields, material
from tests.support.calls import counted

KEPT = 3
RUNS = {
    "a pass": ({}, {}),
    "a pass, merged": ({"merge": True}, {"merge_experts": True}),
    "a pass behind cut layers": ({"propagate": "pruned"}, {"propagate_experts": "pruned"}),
    "given statistics": ({"statistics": "first"}, {"expert_scores": "statistics"}),
    "given statistics, merged": (
        {"statistics": "first", "merge": True},
        {"expert_scores": "statistics", "merge_experts": True},
    ),
    "weights": ({"score": "aimer"}, {"expert_scores": "weights"}),
    "a pass, trained routers": ({"router_kd": 2}, {"router_kd": 2}),
    "a pass behind cut layers, both trained": (
        {"propagate": "pruned", "router_kd": 2, "reconstruct": 2},
        {"propagate_experts": "pruned", "router_kd": 2, "reconstruct": 2},
    ),
    "given statistics, merged and trained": (
        {"statistics": "first", "merge": True, "reconstruct": 2},
        {"expert_scores": "statistics", "merge_experts": True, "reconstruct": 2},
    ),
    "weights, trained": ({"score": "aimer", "reconstruct": 2}, {"expert_scores": "weights", "reconstruct": 2}),
}


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    folder = material(tmp_path_factory.mktemp("mixture"), "qwen3_moe")
    given = fields(folder, "first", keep=KEPT, merge=True)
    experts(ExpertsRecipe.checked(given), Reporter(quiet=True))
    return folder


@pytest.mark.parametrize("weights", ["resident", "streamed"])
@pytest.mark.parametrize("way", RUNS)
def test_a_planned_run_makes_the_calls_that_the_run_makes(way, weights, mixture, tmp_path, monkeypatch):
    asked, planned = ({**own} for own in RUNS[way])
    passes = "pass" in way
    trained = "trained" in way
    replicas = 2 if trained and weights == "streamed" else 1
    if "statistics" in asked:
        asked["statistics"] = str(mixture / asked["statistics"])
    text = {} if passes or trained else {"calibration": ("c4",)}
    run = fields(mixture, tmp_path / "out", keep=KEPT, shards=2, replicas=replicas, weights=weights, **asked) | text
    made = counted(monkeypatch, LocalGroup)
    experts(ExpertsRecipe.checked(run), Reporter(quiet=True))

    values = {"samples": SAMPLES, "seqlen": SEQLEN, "wave": WAVE, "keep_experts": KEPT, "hardware": "cpu", **planned}
    recipe = PlanRecipe.checked({"model": str(mixture / "model"), **values})
    model = with_fewer_experts(read_model(recipe.model), recipe)
    layout = plan_layout(model.layers, SAMPLES, "exact", 2, replicas, None)
    setup = Setup(layout, weights == "streamed", False, gpu=False)
    foreseen = counted(monkeypatch, SimulatedGroup)
    simulate(Costs(planned_task(recipe, model), setup, recipe.row, Places(replicas, 4)))
    # A plan takes no training for one that helps; the run undoes those that do not.
    undone = {key: foreseen.pop(key) for key in list(foreseen) if key[0] == "put_back"}
    assert len(undone) == (2 if trained else 0)
    assert all(made.pop(key, 0) <= count for key, count in undone.items())
    assert foreseen == made
    entered = made["embed", 0]
    observed = passes and not ("behind" in way and trained)
    eight, four = (replicas * -(-windows // replicas // WAVE) for windows in (8, 4))  # that train, and that judge
    assert entered == observed * replicas * -(-SAMPLES // replicas // WAVE) + trained * (eight + four)
