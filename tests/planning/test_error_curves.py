"""The memory of a run that measures error curves, as a plan has it."""

from shardprune.cluster.layout import plan_layout
from shardprune.planning.memory import WorkerMemory
from shardprune.planning.moments import Setup
from shardprune.planning.recipe import PlanRecipe
from shardprune.planning.workload import planned_task, read_model
from tests.planning.material import CONFIGS

TOKENS = 8 * 2048  # of the windows that curves are measured on


def peaks(shards=1, replicas=1, streamed=False, shard=0, **fields):
    values = {"model": str(CONFIGS / "llama-3.1-8b"), "allocation": "fisher", "samples": 64, "wave": 1, **fields}
    recipe = PlanRecipe.checked(values)
    model = read_model(recipe.model)
    layout = plan_layout(model.layers, recipe.samples, "exact", shards, replicas, None)
    task = planned_task(recipe, model)
    memory = WorkerMemory(task, Setup(layout, streamed, waves_on_host=False, gpu=True), shard)
    return model, {moment.step: moment.device for moment in memory.moments() if moment.phase == "curves"}


def test_layers_keep_what_enters_them_and_solve_some_rows_with_all_sums():
    model, moments = peaks()
    hidden = TOKENS * 4096
    kept = 32 * 2 * hidden + 4 * hidden
    assert moments["measure down"].activations == kept
    assert moments["measure down"].statistics == sum(4 * one.cols**2 for one in model.inputs)
    assert moments["measure down"].workspace >= 6 * 14336**2
    assert moments["backward"].activations > moments["forward"].activations > kept
    assert moments["labels"].activations >= kept + 44 * 2**24
    assert moments["forward"].weights == 32 * 2 * model.layer + 2 * (model.embedding + model.head)


def test_shards_and_replicas_divide_it():
    _, whole = peaks()
    _, part = peaks(shards=4, replicas=2, shard=1)
    hidden = TOKENS // 2 * 4096
    assert part["measure down"].activations == 8 * 2 * hidden + 4 * hidden
    assert part["measure down"].statistics > whole["measure down"].statistics  # with what another replica sends
    assert "labels" not in part
    model, streamed = peaks(streamed=True)
    assert streamed["backward"].weights == 2 * 2 * model.layer


def test_other_allocations_take_none_of_it():
    assert peaks(allocation="owl")[1] == {}
