"""Plans of runs that remove structures, beside these runs: the same calls of workers, by verb and shard."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from shardprune import Recipe, prune
from shardprune.cluster.layout import plan_layout
from shardprune.cluster.local_backend import LocalGroup
from shardprune.planning.costs import Costs, Places
from shardprune.planning.moments import Setup
from shardprune.planning.narrowing import planned_tasks, read_planned
from shardprune.planning.recipe import PlanRecipe
from shardprune.planning.simulation import SimulatedGroup, simulate
from shardprune.planning.traffic import traffic_of
from shardprune.report.progress import Reporter
from tests.planning.material import make_windows
from tests.support.calls import counted

VOCABULARY, LAYERS, SAMPLES, SEQLEN, WAVE = 64, 4, 10, 16, 2
RUNS = {
    "corrected": {},
    "as it is": {"correction": False},
    "by activity, in segments": {"score": "amp", "correction": False, "propagation": "parallel"},
    "by outliers, trained": {"score": "outlier", "reconstruct": 2},
    "composite": {"sparsity": 0.5},
    "composite, shared out and trained": {
        "pattern": "unstructured",
        "sparsity": 0.6,
        "allocation": "owl",
        "reconstruct": 2,
    },
    "composite by error curves": {"sparsity": 0.5, "allocation": "fisher"},
}


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    """A model, calibration windows and those that perplexity is measured on."""
    folder = tmp_path_factory.mktemp("structured")
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": LAYERS, "vocab_size": VOCABULARY}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 64}
    LlamaForCausalLM(LlamaConfig(**sizes, **heads)).save_pretrained(folder / "model")
    make_windows(folder / "text.npy", SAMPLES, SEQLEN, VOCABULARY)
    make_windows(folder / "judged.npy", 5, SEQLEN, VOCABULARY)
    return folder


def asked(folder, **fields):
    text = {"calibration": f"{folder}/text.npy", "samples": SAMPLES, "seqlen": SEQLEN, "wave": WAVE}
    judged = {"eval": f"{folder}/judged.npy", "eval_windows": 5}
    return {"model": f"{folder}/model", "structured": 0.4, "neuron_multiple": 16, **text, **judged, **fields}


OFTEN = (
    ("corrected", "streamed"),
    ("as it is", "resident"),
    ("by outliers, trained", "streamed"),
    ("composite, shared out and trained", "resident"),
)


@pytest.mark.parametrize(
    ("way", "weights"),
    [
        pytest.param(way, weights, marks=() if (way, weights) in OFTEN else pytest.mark.long)
        for way in RUNS
        for weights in ("resident", "streamed")
    ],
)
def test_a_planned_run_makes_the_calls_that_the_run_makes(way, weights, material, tmp_path, monkeypatch):
    replicas = 2 if weights == "streamed" else 1
    fields = asked(material, shards=2, replicas=replicas, weights=weights, **RUNS[way])
    made = counted(monkeypatch, LocalGroup)
    run = Recipe.checked({**fields, "out": str(tmp_path / "out"), "backend": "local", "threads": 1, "report": False})
    result = prune(run, Reporter(quiet=True))

    recipe = PlanRecipe.checked({**fields, "hardware": "cpu"})
    model = read_planned(recipe)
    propagation = run.propagation
    layout = plan_layout(model.layers, SAMPLES, propagation, 2, replicas, None)
    setup = Setup(layout, weights == "streamed", False, gpu=False)
    foreseen = counted(monkeypatch, SimulatedGroup)
    tasks = planned_tasks(recipe, model)
    group = simulate(*(Costs(task, setup, recipe.row, Places(replicas, 4)) for task in tasks))
    # A plan takes no training for one that helps; the run undoes those that do not.
    undone = {key: foreseen.pop(key) for key in list(foreseen) if key[0] == "put_back"}
    assert len(undone) == (2 if "trained" in way else 0)
    assert all(made.pop(key, 0) <= count for key, count in undone.items())
    assert foreseen == made
    assert made["narrow", 0] == made["narrow", 1] == LAYERS / 2
    assert len(tasks) == 1 + ("composite" in way)
    assert model.narrower.parameters == result.model.parameters_after < model.parameters
    assert traffic_of(group).written == len(tasks) * 4 * model.narrower.parameters
