"""Plans of mixtures of experts: what a token passes through, and the memory of sums in chunks."""

import pytest
import torch
from transformers import AutoConfig

from shardprune.cluster.layout import plan_layout
from shardprune.model.skeleton import Skeleton
from shardprune.planning.choosing import choose
from shardprune.planning.memory import WorkerMemory
from shardprune.planning.moments import Setup
from shardprune.planning.plan import plan
from shardprune.planning.recipe import PlanRecipe
from shardprune.planning.workload import model_of, planned_task, read_model
from tests.support.architectures import MIXTURES
from tests.support.public_mixtures import public_config


@pytest.fixture(scope="module")
def deepseek(tmp_path_factory):
    """The shapes of DeepSeek-V3, from its config."""
    folder = tmp_path_factory.mktemp("deepseek")
    public_config("DeepSeek-V3").save_pretrained(folder)
    return read_model(str(folder))


def test_a_token_passes_through_the_experts_that_it_is_routed_to(deepseek):
    assert deepseek.parameters / 1e9 == pytest.approx(671, abs=0.5)
    active = sum(shape.multiplied for shape in deepseek.shapes) + deepseek.head
    assert active / 1e9 == pytest.approx(37, abs=0.5)  # as its authors count
    layer = deepseek.shapes[-1]
    assert layer.experts == 256
    assert {one.share for one in layer.inputs} == {1.0, 8 / 256}


@pytest.mark.parametrize(("chunks", "experts"), [(1, 256), (2, 128), (4, 64)])
def test_sums_of_a_chunk_are_held_at_a_time(chunks, experts, deepseek):
    recipe = PlanRecipe.checked({"model": "DeepSeek-V3", "sparsity": 0.5})
    task = planned_task(recipe, deepseek).at(60)
    layout = plan_layout(61, recipe.samples, "exact", 1, 1, None)
    setup = Setup(layout, streamed=True, waves_on_host=True, gpu=True, chunks=chunks)
    moments = [one for one in WorkerMemory(task, setup, 0).moments() if one.step == "accumulate"]
    h, neurons, common = 7168, 2048, 7168**2
    of_experts = experts * (h**2 + neurons**2)
    others = h**2 + 1536**2 + 512**2 + (128 * 128) ** 2 + h**2 + neurons**2  # latent attention, the shared expert
    # Chunks that are alike are one moment.
    sums = [4 * (of_experts + common)] * (chunks > 1) + [4 * (of_experts + common + others)]
    assert [one.device.statistics for one in moments] == sums


def test_error_curves_take_the_sums_of_all_experts_of_a_layer_at_once(deepseek):
    recipe = PlanRecipe.checked({"model": "DeepSeek-V3", "sparsity": 0.7, "allocation": "fisher"})
    task = planned_task(recipe, deepseek).at(60)
    layout = plan_layout(61, recipe.samples, "exact", 1, 1, None)
    setup = Setup(layout, streamed=True, waves_on_host=True, gpu=True, chunks=4)
    moments = [one for one in WorkerMemory(task, setup, 0).moments() if one.phase == "curves"]
    h, neurons = 7168, 2048
    others = h**2 + 1536**2 + 512**2 + (128 * 128) ** 2 + h**2 + neurons**2
    expected = 4 * (256 * (h**2 + neurons**2) + h**2 + others)
    assert [one.device.statistics for one in moments if one.step == "gather"] == [expected]


def test_a_gpu_that_is_too_small_gets_chunks(deepseek):
    fields = {"nodes": 1, "gpus": 1, "host_memory": "2TB", "shards": 1, "replicas": 1, "weights": "streamed"}
    recipe = PlanRecipe.checked({"model": "DeepSeek-V3", "sparsity": 0.5, **fields})
    chosen = choose(recipe, deepseek, "exact")
    assert chosen.fits
    assert chosen.setup.chunks == 4
    whole = choose(recipe.model_copy(update={"expert_chunks": 1}), deepseek, "exact")
    assert not whole.fits
    assert whole.seconds.prune < chosen.seconds.prune  # passes over the layer


@pytest.mark.parametrize(
    "model_type", ["qwen3_moe", "gpt_oss", "deepseek_v3", "gemma4_text", "hunyuan_v1_moe", "longcat_flash"]
)
def test_the_share_of_an_expert_is_that_of_the_config(model_type):
    skeleton = Skeleton(AutoConfig.for_model(model_type, **MIXTURES[model_type]), "cpu")
    model = model_of(skeleton, model_type, torch.float32)
    experts = {"qwen3_moe": 6, "longcat_flash": 4 + 2}.get(model_type, 4)  # two without weights
    assert {one.share for one in model.shapes[-1].inputs} == {1.0, 2 / experts}


def test_chunks_are_simulated_and_named_among_the_options(tmp_path):
    values = {**MIXTURES["qwen3_moe"], "hidden_size": 512, "moe_intermediate_size": 256, "num_hidden_layers": 4}
    AutoConfig.for_model("qwen3_moe", **values, dtype="bfloat16").save_pretrained(tmp_path)
    fields = {"sparsity": 0.5, "seqlen": 64, "nodes": 1, "gpus": 2, "shards": 1, "replicas": 2, "propagation": "exact"}
    seconds = []
    for chunks in (1, 3):
        (one,) = plan(PlanRecipe.checked({"model": str(tmp_path), **fields, "expert_chunks": chunks})).plans
        assert one.options.get("expert-chunks") == (chunks if chunks > 1 else None)
        seconds.append(one.group.phases["prune"])
    assert seconds[0] < seconds[1]
