"""Plans of fine-tunings: their memory beside that of trainings of this process, and what does not fit is refused."""

import json
from pathlib import Path
from unittest.mock import patch

import pytest
from safetensors.torch import load_file, save_file

from shardprune.cluster.local_backend import LocalBackend
from shardprune.commands.prepare_recovery import prepare_recovery
from shardprune.errors import InputError
from shardprune.model.checkpoint import Checkpoint
from shardprune.model.experts import Stack
from shardprune.planning.training import memory, passes
from shardprune.planning.training.need import training_memory
from shardprune.planning.training.plan import plan_training
from shardprune.planning.training.recipe import TrainingPlanRecipe
from tests.planning.alive import measured
from tests.recovery.trainings import checked, make_sparse
from tests.support.architectures import MIXTURES, make_architecture
from tests.support.tiny import CONFIGS, VOCABULARY
from tests.support.words import WORDS

# Wide enough for tensors to outweigh what DeepSpeed pads and keeps beside them.
WIDE = {
    "llama-3.1": (
        CONFIGS["llama-3.1"][0],
        {
            **CONFIGS["llama-3.1"][1],
            **{"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4},
            **{"num_key_value_heads": 2, "head_dim": 64},
        },
    )
}


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A model of 1.2 million parameters."""
    import numpy as np

    folder = tmp_path_factory.mktemp("wide")
    make_sparse(folder / "sparse", configs=WIDE)
    rows = np.random.default_rng(0).integers(0, VOCABULARY, (8, 32))
    np.save(folder / "rows.npy", rows.astype(np.int64))
    return folder


KINDS = {
    "full, stage 0": {"full": True, "zero": 0},
    "full, stage 1": {"full": True, "zero": 1},
    "full, stage 3": {"full": True, "zero": 3},
    "full, zeros kept, recomputed": {"full": True, "zero": 1, "keep_sparsity": True, "recompute": True},
    "low-rank": {"zero": 1, "lora_rank": 8},
    "low-rank, zeros kept, teacher": {"zero": 1, "lora_rank": 8, "keep_sparsity": True, "teacher": True},
    "low-rank, stored teacher": {"zero": 1, "lora_rank": 8, "teacher": True, "teacher_top": 8},
    "low-rank, stage 3, stored teacher": {"zero": 3, "lora_rank": 8, "teacher": True, "teacher_top": 8},
}


# Two micro-batches a step, whose gradients add up, and for some kinds a single one.
@pytest.mark.parametrize(
    ("kind", "micro"), [*((kind, 2) for kind in KINDS), ("full, stage 0", 4), ("full, stage 1", 4)]
)
def test_tensors_take_the_memory_that_is_predicted(wide, kind, micro, tmp_path):
    options = dict(KINDS[kind])
    if options.pop("teacher", False):
        options["teacher"] = str(wide / "sparse")
    data, shape = str(wide / "rows.npy"), {"length": 32, "batch": 4, "micro_batch": micro, "steps": 2}
    fields = {"model": str(wide / "sparse"), "data": data, "checkpoint_every": 9, **shape, **options}
    prepared = prepare_recovery(checked(wide, tmp_path / "o", **fields), LocalBackend())
    inputs = prepared.inputs
    predicted = training_memory(prepared.recipe, inputs.skeleton, inputs.teacher, inputs.rows.longest).device.peak
    assert predicted == pytest.approx(measured(prepared), rel=0.1)


EXPERTS = {
    **MIXTURES["qwen3_moe"],
    **{"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4},
    **{"num_key_value_heads": 2, "head_dim": 64, "moe_intermediate_size": 128, "num_experts": 8},
}
OF_EXPERTS = {
    "full, zeros kept": {"full": True, "zero": 2, "keep_sparsity": True},
    "low-rank": {"zero": 1, "lora_rank": 8},
    "low-rank, zeros kept, teacher": {"zero": 2, "lora_rank": 8, "keep_sparsity": True, "teacher": "{}"},
}


@pytest.fixture(scope="module")
def experts(tmp_path_factory):
    """A mixture of two layers with eight experts, half of whose weights are zero."""
    folder = tmp_path_factory.mktemp("experts")
    make_architecture(folder, "qwen3_moe", EXPERTS)
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        if ".layers." in name and "_proj" in name:
            tensor[tensor.abs() < tensor.abs().median()] = 0
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return str(folder)


@pytest.mark.parametrize(
    "kind", ["full, zeros kept", *(pytest.param(kind, marks=pytest.mark.long) for kind in [*OF_EXPERTS][1:])]
)
def test_experts_take_the_memory_that_is_predicted(wide, experts, kind, tmp_path):
    options = {name: experts if value == "{}" else value for name, value in OF_EXPERTS[kind].items()}
    data, shape = str(wide / "rows.npy"), {"length": 32, "batch": 4, "micro_batch": 2, "steps": 2}
    fields = {"model": experts, "data": data, "checkpoint_every": 9, **shape, **options}
    prepared = prepare_recovery(checked(wide, tmp_path / "o", **fields), LocalBackend())
    inputs = prepared.inputs
    predicted = training_memory(prepared.recipe, inputs.skeleton, inputs.teacher, inputs.rows.longest).device.peak
    assert predicted == pytest.approx(measured(prepared), rel=0.1)


def test_few_experts_stand_for_all(tmp_path, monkeypatch):
    many = make_architecture(tmp_path, "qwen3_moe", {**EXPERTS, "num_experts": 32, "num_hidden_layers": 1})
    way = {"zero": 2, "offload": False, "recompute": False}
    seeing, tell = set(), Stack.tell
    monkeypatch.setattr(Stack, "tell", lambda self, parts, *told: seeing.add(id(parts)) or tell(self, parts, *told))

    def counted():
        seeing.clear()
        memory._counted.clear()
        plan_training(TrainingPlanRecipe.checked({"model": many, "length": 64, "batch": 4, **way}))
        (sizes,) = memory._counted.values()
        return len(seeing), sizes.passes

    experts, few = counted()
    monkeypatch.setattr(passes, "FEW", 32)
    all_experts, every = counted()
    assert (experts, all_experts) == (2 * 16, 2 * 32)  # of two stacks: gate and up, and down
    assert few.kept == pytest.approx(every.kept, rel=0.02)
    assert few.peak(4) == pytest.approx(every.peak(4), rel=0.02)


def test_a_token_is_multiplied_with_the_experts_that_it_passes_through(experts):
    plan = plan_training(TrainingPlanRecipe.checked({"model": experts, "length": 32, "batch": 4, "full": True}))
    of_experts = 2 * 8 * 3 * 256 * 128  # layers, experts, parts
    passed = plan.parameters - VOCABULARY * 256 - of_experts * 3 // 4  # two of eight see a token
    attention = 2 * 32 * 256
    assert {way.stage.zero for way in plan.ways} == {1, 2}
    assert plan.ways[0].work.operations == 4 * 32 * 3 * 2 * (passed + attention)


LLAMA_70B = {
    **{"model_type": "llama", "architectures": ["LlamaForCausalLM"], "dtype": "bfloat16"},
    **{"hidden_size": 8192, "num_hidden_layers": 80, "intermediate_size": 28672, "vocab_size": 128256},
    **{"num_attention_heads": 64, "num_key_value_heads": 8},
}


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """A model of Llama-70B's shapes with four of its layers."""
    file = tmp_path_factory.mktemp("config") / "config.json"
    file.write_text(json.dumps({**LLAMA_70B, "num_hidden_layers": 4}))
    return str(file)


def test_stages_share_out_what_they_say(config):
    plan = plan_training(TrainingPlanRecipe.checked({"model": config, "gpus": 8, "full": True, "recompute": True}))
    ways = {(way.stage.zero, way.stage.offload): way for way in plan.ways}
    assert list(ways) == [(1, False), (1, True), (2, False), (2, True), (3, False), (3, True)]  # 0 is not for bf16
    weights = 2 * plan.parameters
    assert plan.trained == plan.parameters
    for zero in (1, 2):
        assert ways[zero, False].memory.device.weights == weights
    assert ways[3, True].memory.host.weights == weights // 8
    for zero in (1, 2, 3):
        assert ways[zero, False].memory.device.optimizer == 12 * plan.parameters // 8
        assert ways[zero, True].memory.device.optimizer == 0
        assert ways[zero, True].memory.host.optimizer == pytest.approx(12 * plan.parameters / 8)
        assert ways[zero, True].memory.device.peak < ways[zero, False].memory.device.peak
    peaks = [ways[zero, False].memory.device.peak for zero in (1, 2, 3)]
    assert peaks == sorted(peaks, reverse=True)
    # Stage 2 sends gradients and weights once, stage 3 weights twice more, and once more for what is computed anew.
    one = 7 / 8 * weights
    assert ways[2, False].work.between_processes == pytest.approx(2 * one)
    assert ways[3, False].work.between_processes == pytest.approx(4 * one)


def test_recomputing_takes_less_memory_and_more_time(config):
    fields = {"model": config, "gpus": 8, "zero": 3, "offload": False, "keep_sparsity": True}
    kept, recomputed = plan_training(TrainingPlanRecipe.checked(fields)).ways
    assert recomputed.memory.device.activations < kept.memory.device.activations / 5
    assert recomputed.work.operations == pytest.approx(4 / 3 * kept.work.operations)


def test_a_teacher_is_shared_out_like_the_student(config):
    fields = {"model": config, "gpus": 4, "zero": 3, "offload": False, "recompute": True, "batch": 4, "length": 64}
    (alone,) = plan_training(TrainingPlanRecipe.checked(fields)).ways
    (taught,) = plan_training(TrainingPlanRecipe.checked({**fields, "teacher": config})).ways
    logits = 63 * 128256 * 2
    plan = plan_training(TrainingPlanRecipe.checked(fields))
    assert alone.memory.device.teacher == 0
    gathered = 2 * (1_050_000_000 + 128256 * 8192)
    assert taught.memory.device.teacher == 2 * plan.parameters // 4 + gathered + logits


def test_a_teacher_that_stores_its_predictions_is_not_there_while_the_student_learns(config):
    fields = {"model": config, "gpus": 4, "zero": 3, "offload": False, "recompute": True, "batch": 4, "length": 64}
    (alone,) = plan_training(TrainingPlanRecipe.checked(fields)).ways
    (live,) = plan_training(TrainingPlanRecipe.checked({**fields, "teacher": config})).ways
    plan = plan_training(TrainingPlanRecipe.checked({**fields, "teacher": config, "teacher_top": 64}))
    (stored,) = plan.ways
    assert plan.as_json()["teacher_bytes_per_token"] == 64 * 6 + 2
    assert stored.memory.device.teacher == 63 * (64 * 6 + 2)
    assert alone.memory.device.peak < stored.memory.device.peak < live.memory.device.peak - plan.parameters / 2
    assert stored.work == alone.work
    assert live.work.operations > alone.work.operations


def test_the_pass_of_a_teacher_may_take_more_than_the_training(config, tmp_path):
    """One of twenty layers and a student of one, on a GPU that has room for the teacher alone."""
    layers = {"teacher": 20, "student": 1}
    for name, count in layers.items():
        (tmp_path / f"{name}.json").write_text(json.dumps({**LLAMA_70B, "num_hidden_layers": count}))
    fields = {"model": f"{tmp_path}/student.json", "teacher": f"{tmp_path}/teacher.json", "teacher_top": 64}
    shape = {"zero": 2, "offload": False, "recompute": True, "batch": 1, "length": 64, "lora_rank": 8}
    (way,) = plan_training(TrainingPlanRecipe.checked({**fields, **shape})).ways
    wide, narrow, between, words = 8192, 1024, 28672, 128256
    layer = 2 * wide * wide + 2 * wide * narrow + 3 * wide * between + 2 * wide
    assert way.memory.device.teacher == 2 * (20 * layer + wide + 2 * wide * words)
    assert way.memory.device.weights == way.memory.device.optimizer == 0
    # In float32, its predictions and what is left of them when the largest are taken out.
    assert way.memory.device.workspace > 63 * words * 2 * 4


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"teacher_top": 64}, "teacher_top: 64 has no effect without teacher"),
        ({"teacher": "other.json", "teacher_top": 7}, "teacher: .*predicts 7 tokens, the model 128256"),
        ({"gpus": 3}, "batch: 16 cannot be shared evenly by 3 processes; use a multiple of 3"),
        ({"workers": 2}, "workers: 2 workers need as many GPUs; the machines have 1"),
        ({"zero": 0, "offload": True}, "offload: True has no effect without zero 1, 2 or 3"),
        ({"zero": 4}, "zero: 4 is not allowed; .*less than or equal to 3"),
        ({"zero": 0}, "zero: 0 does not go with bf16; use 1, which is the same training, or precision fp32$"),
        ({"zero": 0, "hardware": "cpu", "precision": "bf16"}, "zero: 0 does not go with bf16"),
        ({"lora_rank": 100_000}, "lora_rank: 100000 is more than any projection has .*; use at most 28672$"),
        ({"full": True, "lora_rank": 8}, "lora_rank: 8 has no effect without low-rank updates"),
        ({"full": True, "lora_dropout": 0.1}, "lora_dropout: 0.1 has no effect without low-rank updates"),
        ({"teacher": "other.json"}, "teacher: .*predicts 7 tokens, the model 128256"),
        ({"teacher": "narrow.json"}, "teacher: 512 is more than the model's 256 positions"),
        ({"teacher": "unknown.json"}, "teacher: .*'x'"),
        ({"teacher": "folder"}, "teacher: .*'x'"),
        ({"teacher": "fp8.json"}, "teacher: fp8.json: quantization_config"),
    ],
)
def test_bad_input_is_refused(config, fields, reason, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("other.json").write_text(json.dumps({**LLAMA_70B, "num_hidden_layers": 1, "vocab_size": 7}))
    Path("narrow.json").write_text(json.dumps({**LLAMA_70B, "num_hidden_layers": 1, "max_position_embeddings": 256}))
    Path("folder").mkdir()
    for file in ("unknown.json", "folder/config.json"):
        Path(file).write_text(json.dumps({**LLAMA_70B, "model_type": "x"}))
    fp8 = {"quant_method": "fp8", "weight_block_size": "wide"}
    Path("fp8.json").write_text(json.dumps({**LLAMA_70B, "quantization_config": fp8}))
    with pytest.raises(InputError, match=f"^{reason}"):
        plan_training(TrainingPlanRecipe.checked({"model": config, **fields}))


def test_what_is_not_trained_is_not_planned(config, tmp_path):
    experts = make_architecture(tmp_path / "experts", "qwen3_moe", MIXTURES["qwen3_moe"])
    for fields in ({"model": experts}, {"model": make_sparse(tmp_path / "dense"), "teacher": experts}):
        with pytest.raises(InputError, match="^zero: 3 does not partition the experts of a mixture; use 0, 1 or 2$"):
            plan_training(TrainingPlanRecipe.checked({**fields, "length": 8, "zero": 3}))
    with pytest.raises(InputError, match="^length: 4096 "):
        plan_training(TrainingPlanRecipe.checked({"model": config, "length": 4096}))


def test_an_export_is_refused_as_a_training_refuses_it(config, tmp_path):
    (tmp_path / "config.json").write_text(Path(config).read_text())
    (tmp_path / "export.json").touch()
    with pytest.raises(InputError, match=r"^model: .* holds an export; `shardprune export --restore` makes"):
        plan_training(TrainingPlanRecipe(model=str(tmp_path), gpus=1))


def test_a_recipe_of_a_recovery_is_one_of_a_plan():
    run = {"model": "m", "out": "o", "data": ["c4:2", "stdlib"], "zero": 2, "workers": 1, "best": True, "held_out": 0.1}
    assert TrainingPlanRecipe.checked(run).zero == 2


@pytest.mark.parametrize("layers", [1, 4])
def test_a_teacher_takes_the_operations_of_its_own_forward_pass(config, layers, tmp_path):
    """Two for each weight but those of the embedding, which is looked up, and for each pair of its own attention."""
    (tmp_path / "teacher.json").write_text(json.dumps({**LLAMA_70B, "num_hidden_layers": layers}))
    fields = {"model": config, "zero": 3, "offload": False, "recompute": False, "batch": 1, "length": 64}
    (alone,) = plan_training(TrainingPlanRecipe.checked(fields)).ways
    (taught,) = plan_training(TrainingPlanRecipe.checked({**fields, "teacher": str(tmp_path / "teacher.json")})).ways
    wide, narrow, between, words = 8192, 1024, 28672, 128256
    layer = 2 * wide * wide + 2 * wide * narrow + 3 * wide * between + 2 * wide
    weights = layers * layer + wide + wide * words
    assert taught.work.operations - alone.work.operations == 64 * 2 * (weights + layers * 64 * wide)


def test_stage_0_is_planned_in_float32(config):
    fields = {"model": config, "length": 64, "batch": 1, "precision": "fp32", "zero": 0, "recompute": True}
    (way,) = plan_training(TrainingPlanRecipe.checked(fields)).ways
    assert way.options == "--zero 0 --recompute"


@pytest.mark.parametrize("held_out", [0.0, 0.5])
def test_a_training_needs_memory_for_the_longest_row_that_there_is(wide, held_out, tmp_path):
    """Micro-batches are padded to their longest row, whatever the length that cuts rows."""
    lines = [json.dumps({"text": " ".join(WORDS[3:5] * size)}) for size in (2, 5, 3, 4)]
    (tmp_path / "short.jsonl").write_text("\n".join(lines))
    fields = {"model": str(wide / "sparse"), "data": str(tmp_path / "short.jsonl"), "held_out": held_out}
    needs = []
    for length in (11, 64):
        recipe = checked(wide, tmp_path / "o", length=length, full=True, zero=1, learning_rate=None, **fields)
        prepared = prepare_recovery(recipe, LocalBackend())
        assert max(prepared.inputs.rows.longest, prepared.inputs.held_out.longest) == 11  # ten words and the end
        needs.append(prepared.need)
    assert needs[0] == needs[1]


def test_a_training_that_cannot_fit_is_refused_before_a_weight_is_read(wide, tmp_path):
    recipe = checked(
        wide, tmp_path / "o", model=str(wide / "sparse"), data=str(wide / "rows.npy"), length=32, full=True
    )
    with (
        patch.object(Checkpoint, "read", side_effect=AssertionError("a weight is read")),
        patch("shardprune.shard.memory.host_memory", lambda: 10**7),
        pytest.raises(InputError, match=r"^memory: a worker takes 0.0 GB at its peak .*, and its cpu has 0.0 GB"),
    ):
        prepare_recovery(recipe, LocalBackend())
    assert not (tmp_path / "o").exists()
