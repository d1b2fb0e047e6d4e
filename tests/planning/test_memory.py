"""Predicted memory against the measured peaks of real runs, and of real forward passes."""

import shutil

import pytest
import torch
import transformers
from torch.profiler import ProfilerActivity, profile

from benchmarks.expert_memory import config_of
from benchmarks.streamed_memory import write_random
from shardprune.cluster.layout import plan_layout
from shardprune.model.skeleton import Skeleton
from shardprune.planning.choosing import choose
from shardprune.planning.memory import WorkerMemory, largest
from shardprune.planning.moments import Setup, total_bytes
from shardprune.planning.narrowing import planned_tasks, read_planned
from shardprune.planning.plan import plan
from shardprune.planning.recipe import PlanRecipe
from shardprune.planning.worker_tensors import CPU_PROCESS
from shardprune.planning.workload import planned_task, read_model
from tests.planning.material import CONFIGS as SHAPES
from tests.planning.material import forked_runs, make_llama, make_windows, peak_of_run
from tests.support.tiny import CONFIGS

VOCABULARY = 1024
MODELS = {
    "wide": (512, 3456, 1, VOCABULARY, torch.float32),
    "less wide": (512, 2816, 1, VOCABULARY, torch.float32),
    "stored in 16 bits": (1024, 3072, 1, VOCABULARY, torch.bfloat16),
    "narrow": (128, 384, 1, VOCABULARY, torch.float32),
    "large vocabulary": (512, 1024, 4, 80_000, torch.float32),
    "large vocabulary in 16 bits": (768, 1024, 2, 120_000, torch.bfloat16),
}
FEW = {"samples": 4, "seqlen": 128, "sparsity": 0.5}
WEIGHTS_ALONE = {**FEW, "seqlen": 320, "method": "magnitude", "measure_error": False}

# What dominates beside the process: the factor; what ALPS iterates over; choosing zeros; kept waves and the temporaries
# of one; all weights and logits; of streamed weights, embedding and head, one after the other; of 16-bit weights, both
# forms of the one being read.
RUNS = {
    "sparsegpt": ("wide", FEW, "factor down"),
    "measured damping": ("wide", {**FEW, "samples": 8, "damping": "auto"}, "factor down"),
    "stream targets": ("wide", {**FEW, "samples": 8, "wave": 1, "targets": "stream"}, "factor down"),
    "trained": (
        "wide",
        {**FEW, "samples": 8, "wave": 1, "method": "magnitude", "measure_error": False, "reconstruct": 3},
        "train",
    ),
    "alps": ("less wide", {**FEW, "method": "alps"}, "iterate down"),
    "refit": ("wide", {**FEW, "samples": 8, "method": "wanda", "refit": True}, "fit down"),
    "wanda": ("stored in 16 bits", {**FEW, "method": "wanda"}, "select gate/up"),
    "structured": ("wide", {**FEW, "sparsity": None, "structured": 0.2}, "choose down"),
    "waves": ("narrow", {"samples": 1024, "seqlen": 256, "wave": 256, "sparsity": 0.5}, "accumulate"),
    "resident": ("large vocabulary", WEIGHTS_ALONE, "logits"),
    "streamed": ("large vocabulary", {**WEIGHTS_ALONE, "weights": "streamed"}, "logits"),
    "streamed from 16 bits": (
        "large vocabulary in 16 bits",
        {**WEIGHTS_ALONE, "seqlen": 64, "weights": "streamed"},
        "read head",
    ),
    "resident from 16 bits": ("large vocabulary in 16 bits", {**WEIGHTS_ALONE, "seqlen": 64}, "read head"),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Measured peaks by run in a process of its own, and that of a model without weights to speak of."""
    folder = tmp_path_factory.mktemp("memory")
    for name, shape in MODELS.items():
        make_llama(folder / name, *shape)
    make_llama(folder / "nothing", 16, 16, 1, VOCABULARY)

    write_random(config_of(0.1, 2), folder / "mixture", torch.float32)
    jobs = {name: (model, fields) for name, (model, fields, _) in RUNS.items()} | {"nothing": ("nothing", FEW)}
    jobs |= {"mixture": ("mixture", {"samples": 4, "seqlen": 32, "weights": "resident", "keep": 24})}
    found = {}
    with forked_runs() as peak_of:
        for name, (model, fields) in jobs.items():
            windows = make_windows(folder / f"{name}.npy", fields["samples"], fields["seqlen"], VOCABULARY)
            options = {"model": str(folder / model), "calibration": windows, **fields}
            if model.startswith("large vocabulary"):
                options |= {"eval": (windows,), "eval_windows": 1}
            out = folder / f"out {name}"
            found[name] = peak_of(out, options), options
            shutil.rmtree(out)
    yield found
    shutil.rmtree(folder)  # a gigabyte


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.long
def test_what_is_predicted_beside_the_process_is_what_is_measured_within_a_fifth(runs, name):
    peak, options = runs[name]
    nothing, _ = runs["nothing"]
    recipe = PlanRecipe.checked({**options, "hardware": "cpu"})
    model = read_planned(recipe)
    layout = plan_layout(model.layers, recipe.samples, "exact", 1, 1, None)
    setup = Setup(layout, options.get("weights") == "streamed", waves_on_host=True, gpu=False)
    moments = [largest(task, setup)[0] for task in planned_tasks(recipe, model)]
    moment = max(moments, key=total_bytes)
    assert moment.step == RUNS[name][2]
    # Beside the process: a torch that was built with CUDA makes a larger one.
    assert moment.device.peak - CPU_PROCESS == pytest.approx(peak - nothing, rel=0.2)
    assert peak - nothing > CPU_PROCESS / 3


@pytest.mark.long
def test_where_experts_go_as_much_is_held_as_is_predicted(runs):
    peak, options = runs["mixture"]
    nothing, _ = runs["nothing"]
    asked = {"keep_experts" if name == "keep" else name: value for name, value in options.items()}
    (one,) = plan(PlanRecipe.checked({**asked, "hardware": "cpu"})).plans
    predicted = one.candidate.worst[0].device.peak - CPU_PROCESS
    assert predicted > CPU_PROCESS / 3
    assert predicted == pytest.approx(peak - nothing, rel=0.2)


def test_a_process_without_weights_takes_about_as_much_as_is_reckoned(tmp_path):
    make_llama(tmp_path / "nothing", 16, 16, 1, VOCABULARY)
    windows = make_windows(tmp_path / "tokens.npy", FEW["samples"], FEW["seqlen"], VOCABULARY)
    nothing = peak_of_run(tmp_path / "o", {"model": str(tmp_path / "nothing"), "calibration": windows, **FEW})
    assert 0.8 * CPU_PROCESS < nothing < 3 * CPU_PROCESS


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["llama", "llama-3.1", "qwen2", "qwen3", "gemma2", "phi3", "opt"])
def test_a_forward_pass_holds_what_is_predicted(tmp_path, family, dtype):
    class_name, values = CONFIGS[family]
    wide = "ffn_dim" if family == "opt" else "intermediate_size"
    # As wide as real layers are in proportion, so that the MLP holds most.
    config = getattr(transformers, class_name)(**{**values, "hidden_size": 64, "head_dim": 16, wide: 256})
    config.save_pretrained(tmp_path)
    sequences, seqlen = 8, 32
    predicted = read_model(f"{tmp_path}/config.json").forward_bytes(sequences, seqlen, dtype.itemsize)
    assert _forward_peak(config, dtype, sequences, seqlen) == pytest.approx(predicted, rel=0.2)


def _forward_peak(config, dtype, sequences, seqlen):
    """The most bytes that a decoder layer's forward pass holds, by torch's profiler."""
    skeleton = Skeleton(config, "cpu", dtype)
    for parameter in list(skeleton.model.parameters()):
        skeleton._replace(parameter, torch.zeros(parameter.shape, dtype=dtype))
    tensors = ((name, torch.zeros(shape, dtype=dtype)) for name, shape in skeleton.layer_tensors(0).items())
    layer, hidden = skeleton.build_layer(0, tensors), torch.randn(sequences, seqlen, config.hidden_size, dtype=dtype)
    arguments = skeleton.layer_arguments(0, sequences, seqlen)
    with torch.no_grad():
        skeleton.forward_layer(layer, hidden, arguments)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
            skeleton.forward_layer(layer, hidden, arguments)
    held = peak = 0
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def test_what_a_worker_holds_depends_on_its_setup():
    recipe = PlanRecipe.checked({"model": str(SHAPES / "llama-3.1-8b"), "eval": "wikitext2"})
    model = read_model(recipe.model)
    task = planned_task(recipe, model)

    def peaks(shards=1, replicas=1, propagation="exact", streamed=False, on_host=False, shard=0):
        layout = plan_layout(model.layers, recipe.samples, propagation, shards, replicas, None)
        return WorkerMemory(task, Setup(layout, streamed, on_host, gpu=True), shard).peaks()["prune"]

    layer, kept = model.layer * 2, 128 * 2048 * 4096 * 2
    whole = peaks()
    assert whole.device.weights == 32 * layer + 2 * model.embedding * 2  # embedding and head stay
    assert peaks(streamed=True).device.weights == 2 * layer
    assert peaks(shards=4, shard=1).device.weights == 8 * layer
    assert whole.device.activations == kept
    assert peaks(replicas=4).device.activations == kept // 4
    assert peaks(on_host=True).device.activations == 0
    assert peaks(on_host=True).host.activations >= kept
    assert "observe" in WorkerMemory(task, Setup(_parallel(model, 4), False, False, True), 1).peaks()


def test_a_training_that_leaves_the_device_takes_its_moments_along():
    recipe = PlanRecipe.checked({"model": str(SHAPES / "llama-3.1-8b"), "sparsity": 0.5, "reconstruct": 100})
    model = read_model(recipe.model)
    task = planned_task(recipe, model)
    layout = plan_layout(model.layers, recipe.samples, "exact", 1, 1, None)

    def training(on_host):
        moments = WorkerMemory(task, Setup(layout, True, True, gpu=True, trains_on_host=on_host), 0).moments()
        return next(moment for moment in moments if moment.step == "train")

    here, there = training(False), training(True)
    largest, weights = max(one.largest for one in model.inputs), model.projections
    assert here.device.workspace - there.device.workspace == 12 * (weights - largest)  # two moments, float32 weights
    assert there.host.workspace - here.host.workspace == 12 * weights


def test_a_plan_lets_waves_go_before_moments_and_both_before_it_does_not_fit():
    def planned(memory):
        model, recipe = read_model(str(SHAPES / "llama-3.1-70b")), {"reconstruct": 100, "weights": "streamed"}
        recipe |= {"model": str(SHAPES / "llama-3.1-70b"), "sparsity": 0.5, "gpu_memory": memory}
        one = choose(PlanRecipe.checked(recipe | {"shards": 1, "replicas": 1}), model, "exact")
        return one.fits, one.setup.waves_on_host, one.setup.trains_on_host, one.seconds.total, one.row.link

    *placed, tight, tighter = (planned(memory) for memory in ("80GB", "32GB", "24GB", "16GB"))
    assert [one[:3] for one in placed] == [(True, False, False), (True, True, False)]
    assert tight[:3] == (True, True, True)
    assert not tighter[0]
    # A step moves 12 bytes a weight there and back.
    weights, layers = read_model(str(SHAPES / "llama-3.1-70b")).projections, 80
    moved = 100 * layers * 24 * weights / tight[4]
    assert tight[3] - placed[1][3] == pytest.approx(moved, rel=0.02)


def test_replicas_exchange_the_sums_of_their_inputs():
    recipe = PlanRecipe.checked({"model": str(SHAPES / "llama-3.1-8b")})
    model = read_model(recipe.model)
    task = planned_task(recipe, model)
    sums = [4 * one.cols**2 for one in model.inputs]

    def statistics(replicas, gpu):
        layout = plan_layout(model.layers, recipe.samples, "exact", 1, replicas, None)
        moments = WorkerMemory(task, Setup(layout, True, not gpu, gpu), 0).moments()
        return next(moment.device.statistics for moment in moments if moment.step == "factor down")

    assert statistics(1, gpu=True) == statistics(1, gpu=False) == sums[-1]
    # Of the lower triangle, four panels of 1024 columns, and seven of 2048.
    sent = [sums[0] * 5 // 8, sums[1] * 5 // 8, sums[2] * 5 // 8, sums[3] * 4 // 7]
    assert statistics(4, gpu=True) == sum(sums) + sent[-1]
    assert statistics(4, gpu=False) == sum(sums) + sent[-1] + 3 * sent[-1] + sum(sent[:-1])


def _parallel(model, shards):
    return plan_layout(model.layers, 128, "parallel", shards, 1, None)
