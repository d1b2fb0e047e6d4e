"""Plans of runs that remove experts: what they read, write and hold, how long they take, and what is refused."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig

from shardprune.cli import main
from shardprune.cluster.layout import plan_layout
from shardprune.errors import InputError
from shardprune.model.expert_removal import COUNTS, mixture_of, with_experts
from shardprune.model.skeleton import Skeleton
from shardprune.planning.costs import Costs, Places
from shardprune.planning.moments import Setup
from shardprune.planning.plan import plan
from shardprune.planning.recipe import PlanRecipe
from shardprune.planning.seconds import Expected
from shardprune.planning.simulation import simulate
from shardprune.planning.workload import model_of, planned_task, read_model, with_fewer_experts
from shardprune.recipes.experts import ExpertsRecipe
from tests.planning.material import make_llama
from tests.support.architectures import MIXTURES

LAYERS, EXPERTS, KEPT, HIDDEN, NEURONS = 6, 16, 8, 512, 256


@pytest.fixture(scope="module")
def mixture(tmp_path_factory) -> str:
    """The config of a mixture whose experts hold most of its weights."""
    folder = tmp_path_factory.mktemp("mixture")
    values = {**MIXTURES["qwen3_moe"], "num_experts": EXPERTS, "hidden_size": HIDDEN, "moe_intermediate_size": NEURONS}
    AutoConfig.for_model("qwen3_moe", **values | {"num_hidden_layers": LAYERS}, dtype="bfloat16").save_pretrained(
        folder
    )
    return str(folder)


def costs_of(mixture, shards, replicas, streamed, kind=Costs, **fields):
    values = {"samples": 16, "seqlen": 32, "wave": 1, "gpus": 8, "storage": "0.1GB/s", **fields}
    recipe = PlanRecipe.checked({"model": mixture, "remove_experts": 0.5, **values})
    model = with_fewer_experts(read_model(recipe.model), recipe)
    layout = plan_layout(model.layers, recipe.samples, "exact", shards, replicas, None)
    setup = Setup(layout, streamed, False, gpu=True, joined=layout.workers > 1)
    return kind(planned_task(recipe, model), setup, recipe.row, Places(replicas, recipe.gpus))


@pytest.mark.parametrize("model_type", ["qwen3_moe", "deepseek_v3", "gpt_oss", "mixtral", "nemotron_h", "glm4_moe"])
def test_a_config_in_memory_gets_fewer_experts(model_type):
    values = {name: 2 * value if name in COUNTS else value for name, value in MIXTURES[model_type].items()}
    skeleton = Skeleton(AutoConfig.for_model(model_type, **values), "cpu")
    mixture = mixture_of(skeleton)
    kept = mixture.experts // 2
    fewer = with_experts(skeleton, mixture, kept)
    assert mixture_of(fewer).experts == kept
    assert mixture_of(skeleton).experts == mixture.experts  # which stays as it is
    assert fewer.parameters() < skeleton.parameters()


@pytest.mark.parametrize(("multiple", "kept"), [(8, 8), (1, 10), (3, 9)])
def test_a_plan_rounds_the_experts_that_stay_as_the_run_does(mixture, multiple, kept):
    recipe = PlanRecipe.checked({"model": mixture, "remove_experts": 0.4, "expert_multiple": multiple})
    model = with_fewer_experts(read_model(recipe.model), recipe)
    assert model.fewer is not None
    assert mixture_of(model.fewer.skeleton).experts == kept
    run = ExpertsRecipe.checked({"model": mixture, "out": "out", "remove": 0.4, "multiple": multiple})
    assert run.job().removal == recipe.removal


def test_a_plan_counts_what_is_read_and_written(mixture):
    fields = {"weights": "streamed", "shards": 1, "replicas": 1, "gpus": 1, "seqlen": 32}
    result = plan(PlanRecipe.checked({"model": mixture, "remove_experts": 0.5, **fields}))
    (one,) = result.plans
    removed = LAYERS * (EXPERTS - KEPT) * (3 * HIDDEN * NEURONS + HIDDEN)  # and a row of the router for each
    after = result.model.parameters - removed
    assert result.as_json()["model"]["parameters_after"] == after
    assert one.traffic.written == 2 * after
    assert result.model.fewer is not None
    copied = sum(shape.elements for shape in result.model.fewer.shapes)
    passed = sum(shape.elements for shape in result.model.shapes)
    assert one.traffic.read == 2 * (result.model.embedding + passed + copied)
    assert one.options == {"shards": 1, "replicas": 1, "weights": "streamed", "activations": "device"}
    layer = 2 * result.model.layer
    assert one.candidate.worst[0].device.weights == 2 * layer
    assert one.candidate.worst[0].device.statistics == 0


SOURCES = {
    "given": {"expert_scores": "statistics"},
    "weights": {"expert_scores": "weights"},
    "merged": {"merge_experts": True},
    "merged, given": {"expert_scores": "statistics", "merge_experts": True},
}


@pytest.mark.parametrize("source", SOURCES)
def test_what_is_read_follows_from_where_scores_come_from_and_what_is_made_of_experts(source, mixture):
    fields = {"weights": "streamed", "shards": 1, "replicas": 1, "gpus": 1, "seqlen": 32, **SOURCES[source]}
    result = plan(PlanRecipe.checked({"model": mixture, "remove_experts": 0.5, **fields}))
    (one,) = result.plans
    model, fewer = result.model, result.model.fewer
    dense = sum(shape.elements for shape in model.shapes)
    copied = dense if "merged" in source else sum(shape.elements for shape in fewer.shapes)
    looked_at = {"given": 0, "weights": LAYERS * EXPERTS * 3 * HIDDEN * NEURONS, "merged": model.embedding + dense}
    assert one.traffic.read == 2 * (copied + looked_at.get(source, 0))
    assert one.traffic.written == 2 * fewer.parameters
    assert ("observe" in one.candidate.peaks) == ("given" not in source)
    (moment,) = [moment for phase, moment in one.candidate.peaks.items() if phase == "write"]
    assert moment.step == ("merge" if "merged" in source else "copy")


IN_TURN = {
    "behind cut layers": {"propagate_experts": "pruned"},
    "behind cut layers, slow storage": {"propagate_experts": "pruned", "storage": "0.001GB/s"},
    "behind cut layers, merged": {"propagate_experts": "pruned", "merge_experts": True},
    "routers trained": {"router_kd": 20},
    "given, all trained": {"expert_scores": "statistics", "reconstruct": 20},
    "weights, both trained": {"expert_scores": "weights", "router_kd": 5, "reconstruct": 5},
    "behind cut layers, trained": {"propagate_experts": "pruned", "reconstruct": 20},
}


@pytest.mark.parametrize("source", [*SOURCES, *IN_TURN])
@pytest.mark.parametrize(("shards", "replicas", "streamed"), [(1, 1, False), (2, 3, True)])
def test_the_formulae_say_what_the_driver_does_for_every_source_of_scores(source, mixture, shards, replicas, streamed):
    costs = costs_of(mixture, shards, replicas, streamed, **IN_TURN.get(source, SOURCES.get(source)))
    assert Expected(costs).phases().total == pytest.approx(simulate(costs).seconds, rel=0.1)


def test_a_pass_that_merges_takes_every_expert_for_every_token(mixture):
    usual, merging = (costs_of(mixture, 1, 1, True, merge_experts=merged) for merged in (False, True))
    assert usual.of_experts is usual
    more = merging.of_experts.layer(1) - merging.layer(1)
    products = 2 * 32 * EXPERTS * 3 * HIDDEN * NEURONS / merging.row.products
    assert more >= products
    assert simulate(merging).phases["observe"] > simulate(usual).phases["observe"]


def test_a_trained_router_takes_no_products_back_through_the_layer_and_a_trained_layer_does(mixture):
    costs = costs_of(mixture, 1, 1, True, router_kd=3, reconstruct=5)
    assert costs.task.trainings == {"router": 3, "reconstruction": 5}
    assert costs.task.held_out == 4
    cut, row = costs.of_cut, costs.row
    (router,) = costs.task.trained("router")
    assert (router.cols, router.rows) == (HIDDEN, {"mlp.gate": KEPT})
    size, state = 12, 26 + 4 * 2  # windows of a step: all that train; bytes that a weight's step touches
    assert cut.train(3, (router,)) == pytest.approx(3 * (cut.layer(size) + state * KEPT * HIDDEN / row.memory))
    whole = costs.task.trained("reconstruction")
    weights = sum(one.weights for one in whole)
    assert weights > 3 * KEPT * HIDDEN * NEURONS
    assert cut.train(5, whole) == pytest.approx(5 * (3 * cut.layer(size) + state * weights / row.memory))


def test_a_worker_that_trains_holds_the_dense_layer_and_the_cut_one(mixture):
    fields = {"weights": "streamed", "shards": 1, "replicas": 1, "gpus": 1, "seqlen": 32, "keep_experts": KEPT}

    def trained(**steps):
        (one,) = plan(PlanRecipe.checked({"model": mixture, **fields, **steps})).plans
        return one, one.candidate.peaks["prune"], one.candidate.task.model

    one, moment, model = trained(reconstruct=4)
    weights = sum(part.weights for part in model.fewer.shape.inputs)
    largest = max(part.largest for part in model.fewer.shape.inputs)
    assert moment.step == "train"
    assert moment.device.weights == 2 * (2 * model.layer + model.fewer.layer + weights)  # and a copy to put back
    assert moment.device.workspace == (12 + 1 + 2) * weights + 12 * largest
    # In the pass, in turn, and ahead of the layer whose place the one before takes again once it is written.
    dense = LAYERS + LAYERS + (LAYERS - 1)
    # To be copied, to be trained, and behind that as written but for the last.
    cut = LAYERS + LAYERS + (LAYERS - 1)
    assert one.traffic.read == 2 * (2 * model.embedding + dense * model.layer + cut * model.fewer.layer)
    (_, moment, model), router = trained(router_kd=4), KEPT * HIDDEN
    assert moment.device.weights == 2 * (2 * model.layer + model.fewer.layer + router)
    assert moment.device.workspace == (12 + 1 + 2) * router + 12 * router


def test_a_layer_that_is_not_the_largest_is_seen_with_its_own_experts():
    shared = {"first_k_dense_replace": 1, "n_routed_experts": 8, "intermediate_size": 96, "moe_intermediate_size": 16}
    skeleton = Skeleton(AutoConfig.for_model("deepseek_v3", **MIXTURES["deepseek_v3"] | shared), "cpu")
    recipe = PlanRecipe.checked({"model": "m", "keep_experts": 4, "seqlen": 32})
    model = with_fewer_experts(model_of(skeleton, "m", torch.bfloat16), recipe)
    for index in range(model.layers):
        assert model.at(index).fewer.shape is model.fewer.shapes[index]


def test_text_that_the_model_writes_is_no_reason_to_aim_at_anything(mixture):
    recipe = PlanRecipe.checked({"model": mixture, "keep_experts": 8, "seqlen": 32, "calibration": "self"})
    model = with_fewer_experts(read_model(mixture), recipe)
    assert recipe.towards_stream
    assert planned_task(recipe, model).held_out == 0


@pytest.mark.parametrize(
    ("shards", "replicas", "streamed"), [(1, 1, True), (1, 1, False), (2, 1, False), (1, 3, True), (2, 3, False)]
)
def test_the_formulae_say_what_the_driver_does(mixture, shards, replicas, streamed):
    costs = costs_of(mixture, shards, replicas, streamed)
    assert Expected(costs).phases().total == pytest.approx(simulate(costs).seconds, rel=0.1)


@dataclass(frozen=True)
class Copying(Costs):
    """Workers that take one second to copy a layer."""

    def copy_layer(self) -> float:
        return 1.0


@pytest.mark.parametrize(("shards", "replicas"), [(1, 1), (1, 3), (2, 1), (2, 3)])
def test_all_workers_of_a_shard_copy_layers_at_the_same_time(mixture, shards, replicas):
    group = simulate(costs_of(mixture, shards, replicas, True, Copying))
    assert group.phases["write"] == pytest.approx(LAYERS / (shards * replicas), rel=0.05)


def test_a_page_and_its_json_say_the_same(mixture, capsys):
    def printed(*words):
        with pytest.raises(SystemExit) as ended:
            main(["plan", mixture, "--keep-experts", "12", "--seqlen", "32", *words])
        assert ended.value.code == 0
        return capsys.readouterr().out

    content = json.loads(printed("--json"))
    page = printed("--simulate")
    assert f"experts: 12 of 16 stay in a layer, {content['model']['parameters_after']:,} parameters" in page
    assert "experts: fits" in page
    assert "parallel" not in page
    again = PlanRecipe.checked(content["recipe"])
    assert again.keep_experts == 12
    assert again.removal is not None


def test_experts_that_go_by_their_weights_need_no_windows(mixture):
    fields = {"model": mixture, "keep_experts": 12, "seqlen": 1_000_000, "hardware": "cpu"}
    assert plan(PlanRecipe.checked({**fields, "expert_scores": "weights"})).plans
    with pytest.raises(InputError, match="^seqlen: 1000000 is more than the model's"):
        plan(PlanRecipe.checked(fields))


@pytest.mark.parametrize(
    ("fields", "field", "problem"),
    [
        ({"remove_experts": 1.5}, "remove_experts", "1.5 is not allowed; use a number above 0 and below 1"),
        ({"remove_experts": 0.5, "keep_experts": 8}, "keep_experts", "8 does not go with remove_experts 0.5"),
        ({"keep_experts": 0}, "keep_experts", "0 is not allowed"),
        ({"keep_experts": 1}, "keep_experts", "at least 2 must stay"),
        ({"remove_experts": 0.1}, "remove_experts", "nothing would go; give a smaller --expert-multiple"),
        ({"keep_experts": 8, "sparsity": 0.5}, "sparsity", "0.5 does not go with experts that are removed"),
        ({"keep_experts": 8, "method": "wanda"}, "method", "'wanda' does not go with experts that are removed"),
        ({"keep_experts": 8, "quality": "best"}, "quality", "'best' does not go with experts that are removed"),
        ({"merge_experts": True, "sparsity": 0.5}, "merge_experts", "has no effect without remove_experts or keep"),
        ({"expert_scores": "weights", "sparsity": 0.5}, "expert_scores", "has no effect without remove_experts or"),
        ({"keep_experts": 8, "merge_experts": True, "expert_scores": "weights"}, "merge_experts", "does not go with"),
        (
            {"keep_experts": 8, "expert_scores": "statistics", "calibration": "self"},
            "calibration",
            "has no effect with",
        ),
        (
            {"keep_experts": 8, "expert_scores": "weights", "propagate_experts": "pruned"},
            "propagate_experts",
            "'pruned' has no effect without a pass",
        ),
        ({"keep_experts": 8, "expert_multiple": 4}, "expert_multiple", "4 has no effect without remove_experts"),
        ({"remove_experts": 0.5, "expert_multiple": 0}, "expert_multiple", "0 is not allowed"),
        ({"router_kd": 3, "sparsity": 0.5}, "router_kd", "3 has no effect without remove_experts or keep_experts"),
        ({"keep_experts": 8, "router_kd": -1}, "router_kd", "-1 is not allowed"),
        ({"keep_experts": 8, "router_kd": 3, "samples": 4}, "samples", "4 is too few for router_kd"),
        ({"keep_experts": 8, "reconstruct": 3, "samples": 4}, "samples", "4 is too few for reconstruct"),
        ({"keep_experts": 8, "propagation": "parallel"}, "propagation", "'parallel' does not go with experts"),
        ({"keep_experts": 8, "expert_chunks": 2}, "expert_chunks", "2 does not go with experts that are removed"),
    ],
    ids=str,
)
def test_what_is_no_run_of_experts_is_refused(mixture, fields, field, problem):
    with pytest.raises(InputError, match=problem) as raised:
        plan(PlanRecipe.checked({"model": mixture, "seqlen": 32, **fields}))
    assert raised.value.field == field


def test_experts_in_fp8_stay_what_they_are(mixture, tmp_path):
    content = json.loads((Path(mixture) / "config.json").read_text())
    content["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [16, 16]}
    (tmp_path / "config.json").write_text(json.dumps(content))
    fields = {"model": str(tmp_path / "config.json"), "keep_experts": KEPT, "seqlen": 32}
    for field, value in (("reconstruct", 2), ("merge_experts", True)):
        with pytest.raises(InputError, match=f"{value!r} changes the weights of experts, and these are FP8") as raised:
            plan(PlanRecipe.checked({**fields, field: value}))
        assert raised.value.field == field
    assert plan(PlanRecipe.checked({**fields, "router_kd": 2})).fits


def test_no_variation_of_a_plan_holds_out_all_samples(mixture):
    """Of eight, four are held out, and half of them would leave none to train on."""
    fields = {"model": mixture, "keep_experts": KEPT, "seqlen": 32, "samples": 8}
    changed = [
        [row.changed for row in plan(PlanRecipe.checked(fields | steps), True).plans[0].growth]
        for steps in ({}, {"router_kd": 2}, {"reconstruct": 2})
    ]
    assert ["4 samples" in rows for rows in changed] == [True, False, False]
    helps = plan(PlanRecipe.checked(fields | {"router_kd": 2, "gpu_memory": "1.001GB"})).plans[0].helps
    assert helps
    assert not any(label.startswith("--samples") for label in helps)


def test_a_model_without_experts_is_refused(tmp_path):
    make_llama(tmp_path, 16, 16, 1, 64)
    with pytest.raises(InputError, match="has no experts in its layers"):
        plan(PlanRecipe.checked({"model": str(tmp_path), "seqlen": 32, "keep_experts": 8}))
