"""Plans of runs that remove structures: what they read, write and hold, how long they take, and what is refused."""

import json

import pytest

from shardprune.cli import main
from shardprune.cluster.layout import plan_layout
from shardprune.errors import InputError
from shardprune.planning.costs import Costs, Places
from shardprune.planning.cuts import cuts_of
from shardprune.planning.memory import WorkerMemory
from shardprune.planning.moments import Setup
from shardprune.planning.narrowing import planned_tasks, read_planned
from shardprune.planning.plan import plan
from shardprune.planning.recipe import PlanRecipe
from shardprune.planning.seconds import Expected
from shardprune.planning.simulation import simulate
from tests.planning.material import CONFIGS, make_llama

MODEL = str(CONFIGS / "llama-3.1-8b")
ROWS, COLS, KEPT = 4096, 14336, 11264  # of down_proj
QUERIES, QUERIES_KEPT = 4096, 3584  # columns of o_proj


def runs_of(shards=1, replicas=1, propagation="exact", streamed=False, joined=False, on_host=False, **fields):
    values = {"model": MODEL, "structured": 0.2, "samples": 16, "wave": 1, **fields}
    recipe = PlanRecipe.checked(values)
    model = read_planned(recipe)
    layout = plan_layout(model.layers, recipe.samples, propagation, shards, replicas, None)
    setup = Setup(layout, streamed, on_host, gpu=True, joined=joined)
    return [Costs(task, setup, recipe.row, Places(replicas, 8)) for task in planned_tasks(recipe, model)]


AS_THEY_ARE = {"score": "amp", "correction": False, "measure_error": False}
LAYOUTS = [
    {},
    {"streamed": True},
    {"streamed": True, "on_host": True, "score": "outlier"},
    {"shards": 4, "propagation": "parallel"},
    {"replicas": 4},
    {"replicas": 4, "joined": True, "samples": 64},
    {"shards": 2, "replicas": 4, "eval": "wikitext2", "eval_windows": 32},
    AS_THEY_ARE,
    {**AS_THEY_ARE, "streamed": True, "replicas": 2, "samples": 64},
    {"correction": False, "streamed": True, "eval": "wikitext2", "eval_windows": 32},
    {"reconstruct": 20, "replicas": 4, "joined": True, "samples": 64},
    {"sparsity": 0.5},
    {"sparsity": 0.5, "streamed": True, "eval": "wikitext2", "eval_windows": 32},
    {"sparsity": 0.5, "allocation": "fisher", "shards": 2, "replicas": 2, "samples": 32},
    {"sparsity": 0.5, "reconstruct": 20, "replicas": 2, "samples": 32},
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_the_formulae_say_what_the_driver_does(layout):
    runs = runs_of(**layout)
    expected = sum(Expected(costs).phases().total for costs in runs)
    assert expected == pytest.approx(simulate(*runs).seconds, rel=0.1)


def test_layers_lose_columns_of_their_output_projections():
    (costs,) = runs_of()
    attention, mlp = cuts_of(costs.task.model)
    assert (attention.rows, attention.cols, attention.kept, attention.size) == (4096, QUERIES, QUERIES_KEPT, 512)
    assert (mlp.rows, mlp.cols, mlp.kept, mlp.size) == (ROWS, COLS, KEPT, 1)
    assert (attention.rounds, mlp.rounds) == (1, 64)


def moments(**fields):
    (costs, *_) = runs_of(**fields)
    memory = WorkerMemory(costs.task, costs.setup, 0)
    return costs.task.model, {moment.step: moment.device for moment in memory.moments() if moment.phase == "prune"}


def test_sums_are_gram_matrices_of_what_output_projections_read_and_vectors_elsewhere():
    vectors = 4 * 2 * 4096  # of attention and MLP
    assert moments()[1]["accumulate"].statistics == 4 * (QUERIES**2 + COLS**2) + vectors
    assert moments(**AS_THEY_ARE)[1]["accumulate"].statistics == 4 * (QUERIES + COLS) + vectors
    fields = {"score": "amp", "correction": False, "measure_error": True}
    assert moments(**fields)[1]["accumulate"].statistics == 4 * (QUERIES**2 + COLS**2) + vectors


def test_a_narrow_layer_stands_beside_the_one_that_it_comes_from():
    model, found = moments(streamed=True)
    assert found["choose down"].weights == 2 * 2 * model.layer
    assert found["choose down"].workspace >= 12 * COLS**2 + 4 * ROWS * COLS
    assert found["pass on"].weights == 2 * (2 * model.layer + model.narrower.layer)
    model, trained = moments(streamed=True, reconstruct=4)
    assert trained["train"].weights == 2 * (2 * model.layer + model.narrower.layer + model.narrower.projections)
    assert "choose down" not in moments(**AS_THEY_ARE)[1]


def test_a_plan_counts_what_is_read_and_written():
    fields = {"model": MODEL, "propagation": "exact", "weights": "streamed", "shards": 1, "replicas": 1}

    def planned(**more):
        result = plan(PlanRecipe.checked({**fields, "structured": 0.2, **more}))
        return result.model, result.plans[0]

    model, one = planned()
    left = model.narrower
    assert left.parameters == 6_654_529_536
    assert one.traffic.written == 2 * left.parameters
    assert one.traffic.read == 2 * (model.embedding + 32 * model.layer)
    _, both = planned(sparsity=0.5)
    assert both.traffic.written == 2 * 2 * left.parameters
    assert both.traffic.read == one.traffic.read + 2 * (left.embedding + 32 * left.layer)
    assert both.candidate.seconds.structure == pytest.approx(one.candidate.seconds.total)
    assert both.candidate.peaks["structure"].device == one.candidate.peaks["prune"].device
    _, judged = planned(eval="wikitext2", eval_windows=4)
    assert judged.traffic.read == 2 * (3 * model.embedding + 2 * model.head + 64 * model.layer + 32 * left.layer)


def test_a_page_and_its_json_say_the_same(capsys):
    def printed(*words):
        with pytest.raises(SystemExit) as ended:
            main(["plan", MODEL, "--structured", "0.2", "--propagation", "exact", *words])
        assert ended.value.code == 0
        return capsys.readouterr().out

    content = json.loads(printed("--sparsity", "0.5", "--json"))
    assert (content["model"]["groups_after"], content["model"]["neurons_after"]) == (7, KEPT)
    page = printed("--sparsity", "0.5")
    stays = f"7 of 8 key/value groups and {KEPT} of {COLS} neurons stay in a layer"
    assert f"structures: {stays}, {content['model']['parameters_after']:,} parameters" in page
    assert "structure choose down" in page
    again = PlanRecipe.checked(content["recipe"])
    assert (again.structured, again.sparsity) == (0.2, 0.5)
    alone = json.loads(printed("--json"))
    assert alone["recipe"]["sparsity"] is None
    assert alone["plans"][0]["seconds"]["structure"] == 0
    assert PlanRecipe.checked(alone["recipe"]).sparsity is None


def test_what_needs_less_memory_is_said():
    fields = {"model": MODEL, "structured": 0.2, "gpu_memory": "3GB", "samples": 8, "weights": "streamed", "wave": 1}
    one = plan(PlanRecipe.checked({**fields, "propagation": "exact"})).plans[0]
    assert not one.fits
    assert one.missing.startswith("prune, choose down")
    assert "--score amp --no-correction --no-measure-error" in one.helps


@pytest.mark.parametrize(
    ("fields", "field", "problem"),
    [
        ({"structured": 0.999}, "structured", "0.999 is more than the model can give"),
        ({"structured": 1e-6}, "structured", "1e-06 is less than half of what goes together in a layer"),
        ({"structured": 0.4, "sparsity": 0.3}, "sparsity", "0.3 is less than structured removes, 0.4"),
        ({"structured": 0.2, "method": "wanda"}, "method", "'wanda' has no effect without a sparsity or a pattern N:M"),
        ({"structured": 0.2, "targets": "stream"}, "targets", "'stream' has no effect without a sparsity"),
        ({"structured": 0.2, "tensor_parallel": 3}, "tensor_parallel", "3 is not allowed; the model's 2 key/value"),
        ({"score": "amp"}, "score", "'amp' has no effect without structured"),
        ({"structured": 0.2, "keep_experts": 2}, "structured", "0.2 does not go with experts that are removed"),
        ({"structured": 0.2, "sparsity": 0.5, "rebuild": "barber"}, "rebuild", "'barber' is not planned"),
    ],
    ids=str,
)
def test_what_a_run_refuses_is_no_plan(tmp_path, fields, field, problem):
    with pytest.raises(InputError, match=problem) as raised:
        plan(PlanRecipe.checked({"model": make_llama(tmp_path, 64, 192, 2, 64), "seqlen": 32, **fields}))
    assert raised.value.field == field


def test_projections_that_are_to_stay_dense_lose_their_structures_all_the_same():
    first, second = runs_of(sparsity=0.5, ignore=("*.down_proj",))
    assert "mlp.down_proj" in first.task.model.shape.by_first
    assert "mlp.down_proj" not in second.task.model.shape.by_first
    assert second.task.model.shape.maps[-1].cols == KEPT
