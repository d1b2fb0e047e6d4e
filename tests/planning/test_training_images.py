"""Plans of fine-tunings on images: the frozen vision tower takes memory and time, and rows have fewer predictions."""

import json

import pytest
from PIL import Image
from transformers import AutoConfig
from transformers.models.pixtral.image_processing_pil_pixtral import PixtralImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from shardprune.cli import main
from shardprune.cluster.local_backend import LocalBackend
from shardprune.commands.prepare_recovery import prepare_recovery
from shardprune.errors import InputError
from shardprune.planning.training.images import as_large
from shardprune.planning.training.need import training_memory
from shardprune.planning.training.plan import plan_training
from shardprune.planning.training.recipe import TrainingPlanRecipe
from tests.planning.alive import measured
from tests.recovery.trainings import checked
from tests.support.seeing import QWEN, make_seeing, make_seeing_family
from tests.support.tiny import GROUPED
from tests.support.towers import TOWERS

TEXT = {
    **GROUPED["llama"][1],
    **{"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4},
    **{"num_key_value_heads": 4, "head_dim": 64, "max_position_embeddings": 128},
}
VISION = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 3, "num_attention_heads": 4}
SEEN = 64  # tokens of an image
LENGTH = 96


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A LLaVA of 1.3 million parameters with a tower of 1.7 million, and conversations about an image each."""
    folder = tmp_path_factory.mktemp("wide")
    make_seeing(folder / "model", {**VISION, "image_size": 32}, text=TEXT)
    (folder / "images").mkdir()
    answer = {"from": "gpt", "value": "red green blue " * LENGTH}
    rows = []
    for number in range(8):
        Image.new("RGB", (32, 32), (number, 0, 0)).save(folder / "images" / f"{number}.png")
        asked = {"from": "human", "value": "<image> what ?"}
        rows.append({"image": f"{number}.png", "conversations": [asked, answer]})
    (folder / "rows.json").write_text(json.dumps(rows))
    return folder


KINDS = {
    "low-rank": {"zero": 1, "lora_rank": 8},
    "full, recomputed": {"full": True, "zero": 3, "recompute": True},
    "low-rank, teacher": {"zero": 2, "lora_rank": 8, "teacher": "{}"},
    "low-rank, stage 3, stored teacher": {"zero": 3, "lora_rank": 8, "teacher": "{}", "teacher_top": 8},
}


@pytest.mark.parametrize("kind", ["low-rank", *(pytest.param(kind, marks=pytest.mark.long) for kind in [*KINDS][1:])])
def test_tensors_take_the_memory_that_is_predicted(wide, kind, tmp_path):
    model = str(wide / "model")
    options = {name: model if value == "{}" else value for name, value in KINDS[kind].items()}
    shape = {"length": LENGTH, "batch": 4, "micro_batch": 2, "steps": 2, "checkpoint_every": 9, "learning_rate": 1e-3}
    fields = {"model": model, "data": str(wide / "rows.json"), "images": str(wide / "images"), **shape, **options}
    prepared = prepare_recovery(checked(wide, tmp_path / "o", **fields), LocalBackend())
    check_prediction(prepared)


def check_prediction(prepared):
    inputs = prepared.inputs
    assert inputs.rows.longest == LENGTH
    models = prepared.recipe, inputs.skeleton, inputs.teacher, LENGTH
    predicted = training_memory(*models, inputs.images).device.peak
    assert predicted == pytest.approx(measured(prepared), rel=0.1)
    assert predicted > 1.15 * training_memory(*models).device.peak
    assert prepared.need.bytes == predicted  # which is looked at before any weight is read


def wide_family(wide, model_type):
    """The model of a family with parts of such sizes, whose processor makes several tokens of an image."""
    text = {name: value for name, value in TEXT.items() if name in WIDTHS}
    sees = {"depth": 3, "num_heads": 4, "out_hidden_size": 256, **VISION} if model_type in QWEN else VISION
    make_seeing_family(wide / model_type, model_type, text=text, vision=sees)
    return str(wide / model_type)


FURTHER = ("internvl", "mistral3", "qwen3_5")
WIDTHS = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "max_position_embeddings")


@pytest.mark.parametrize(
    "model_type", ["gemma3", "qwen3_vl", *(pytest.param(name, marks=pytest.mark.long) for name in FURTHER)]
)
def test_the_memory_of_other_families_is_predicted(wide, model_type, tmp_path):
    if model_type == "mistral3":
        pytest.importorskip("torchvision", reason="its processor needs it")
    model = wide_family(wide, model_type)
    shape = {"length": LENGTH, "batch": 4, "micro_batch": 2, "steps": 2, "checkpoint_every": 9, "learning_rate": 1e-3}
    fields = {"model": model, "data": str(wide / "rows.json"), "images": str(wide / "images"), **shape}
    prepared = prepare_recovery(checked(wide, tmp_path / "o", **fields, zero=1, lora_rank=8), LocalBackend())
    check_prediction(prepared)


DEPTH = 3  # layers of the tower, of which LLaVA-1.5 has 24
LLAVA = {
    **{"model_type": "llava", "architectures": ["LlavaForConditionalGeneration"], "image_token_index": 32000},
    "vision_config": {
        **{"model_type": "clip_vision_model", "image_size": 336, "patch_size": 14, "num_hidden_layers": DEPTH},
        **{"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16},
    },
    "text_config": {
        **{"model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 1, "intermediate_size": 11008},
        **{"num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32064, "max_position_embeddings": 4096},
    },
}
PATCHES, HIDDEN, BETWEEN, WIDTH = 576, 1024, 4096, 4096


def parameters_of_llava() -> int:
    """Those of the tower and the projector, one tensor after the other."""
    embeddings = HIDDEN + 3 * 14 * 14 * HIDDEN + (PATCHES + 1) * HIDDEN
    layer = 4 * (HIDDEN + 1) * HIDDEN + (HIDDEN + 1) * BETWEEN + (BETWEEN + 1) * HIDDEN + 4 * HIDDEN
    projector = (HIDDEN + 1) * WIDTH + (WIDTH + 1) * WIDTH
    return embeddings + 2 * HIDDEN + DEPTH * layer + 2 * HIDDEN + projector


def operations_of_llava() -> int:
    """Two for each weight and token, and for each pair of tokens those of scores and of values."""
    tokens = PATCHES + 1
    layer = tokens * (4 * HIDDEN * HIDDEN + 2 * HIDDEN * BETWEEN) + 2 * tokens * tokens * HIDDEN
    return 2 * (PATCHES * 3 * 14 * 14 * HIDDEN + DEPTH * layer + PATCHES * (HIDDEN * WIDTH + WIDTH * WIDTH))


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """A model of LLaVA-1.5-7B's shapes with few layers."""
    file = tmp_path_factory.mktemp("config") / "config.json"
    file.write_text(json.dumps(LLAVA))
    return str(file)


def planned(config, **fields):
    shape = {"length": 1024, "batch": 8, "micro_batch": 1, "gpus": 4, "lora_rank": 8, "recompute": True}
    return plan_training(TrainingPlanRecipe.checked({"model": config, **shape, "offload": False, **fields}))


def test_a_tower_is_whole_in_every_process_and_only_goes_forward(config):
    blind, plan = planned(config), planned(config, images="images")
    assert (plan.tower.parameters, plan.tower.tokens) == (parameters_of_llava(), PATCHES)
    assert plan.tower.operations == operations_of_llava()
    assert (plan.parameters, plan.trained) == (blind.parameters, blind.trained)
    for one, other in zip(plan.ways, blind.ways, strict=True):
        assert one.memory.device.weights - other.memory.device.weights == 2 * parameters_of_llava(), one.options
        assert one.work.operations - other.work.operations == 8 * operations_of_llava()
        assert one.work.between_processes == other.work.between_processes
    assert plan.chosen.work.seconds > blind.chosen.work.seconds


def test_a_teacher_has_a_tower_of_its_own(config):
    taught = {"teacher": config, "zero": 3, "images": "images"}
    (live,), (blind,) = planned(config, **taught).ways, planned(config, teacher=config, zero=3).ways
    (stored,), (alone,) = planned(config, **taught, teacher_top=64).ways, planned(config, zero=3, images="images").ways
    logits = 2 * 32064 * (1023 - (1024 - PATCHES))  # images are not predicted
    assert live.memory.device.teacher - blind.memory.device.teacher == 2 * parameters_of_llava() - logits
    assert live.work.operations - blind.work.operations == 2 * 8 * operations_of_llava()
    assert stored.memory.device.teacher == (1024 - PATCHES) * (64 * 6 + 2)
    assert stored.work == alone.work


def test_a_plan_says_what_sees_images(config, capsys):
    words = ["--images", "anywhere", "--length", "2048", "--images-per-row", "2", "--zero", "2", "--gpu-memory", "80GB"]
    with pytest.raises(SystemExit) as done:
        main(["plan-recovery", config, *words])
    assert done.value.code == 0
    said = f"images a row: 2, each 576 of its tokens; what sees them has {parameters_of_llava():,} parameters"
    assert said in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["plan-recovery", config, *words, "--json"])
    tower = json.loads(capsys.readouterr().out)["tower"]
    assert tower == {"parameters": parameters_of_llava(), "tokens": PATCHES, "operations": operations_of_llava()}


@pytest.mark.parametrize("size", [(1280, 720), (333, 500)])
def test_sizes_are_those_of_the_processors(size):
    config = AutoConfig.for_model("mistral3")
    merged = config.vision_config.patch_size * config.spatial_merge_size
    pixtral = PixtralImageProcessorPil(size={"longest_edge": config.vision_config.image_size}, patch_size=merged)
    for other, processor in ((config, pixtral), (AutoConfig.for_model("qwen2_5_vl"), Qwen2VLImageProcessorPil())):
        made = processor(images=[Image.new("RGB", size)], return_tensors="pt")
        image = as_large(other, *size)
        assert image["pixel_values"].shape == made["pixel_values"].shape
        assert image.keys() == made.keys()
        assert all(image[name].tolist() == made[name].tolist() for name in image if name != "pixel_values")


QWEN_SHAPE = {"patch_size": 16, "spatial_merge_size": 2, "temporal_patch_size": 2, "num_position_embeddings": 16}
PIXTRAL_SHAPE = {"patch_size": 4, "image_size": 64}


@pytest.mark.parametrize(
    ("model_type", "vision", "size", "tokens"),
    [
        ("qwen3_vl", QWEN_SHAPE, "1280x720", 40 * 22),  # of 32 x 32 pixels: 22.5 of them are 22
        ("qwen3_vl", QWEN_SHAPE, "9x40", 1),
        ("mistral3", PIXTRAL_SHAPE, "20x17", 3 * 3),  # of 8 x 8 pixels, what is begun counts
        ("mistral3", PIXTRAL_SHAPE, "256x128", 8 * 4),  # no side is longer than 64
        ("mistral3", PIXTRAL_SHAPE, None, 8 * 8),
    ],
)
def test_an_image_has_the_tokens_of_its_size(model_type, vision, size, tokens, tmp_path):
    fields = TOWERS[model_type]
    text = {**fields["text_config"], "max_position_embeddings": 4096}
    parts = {"text_config": text, "vision_config": {**fields["vision_config"], **vision}}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type, **fields, **parts}))
    chosen = {"images": "i", "length": 2048, "zero": 2} | ({"image_size": size} if size else {})
    plan = planned(str(tmp_path / "config.json"), **chosen)
    assert plan.tower.tokens == tokens
    assert plan.image_size == tuple(map(int, (size or "64x64").split("x")))
    blind = planned(str(tmp_path / "config.json"), length=2048, zero=2)
    assert plan.chosen.work.operations - blind.chosen.work.operations == 8 * plan.tower.operations


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"image_size": "9x9"}, "image_size: '9x9' has no effect without images$"),
        ({"images": "i", "image_size": "9"}, "image_size: '9' is no WIDTHxHEIGHT of at most five digits each, as "),
        ({"images": "i", "image_size": "9x9"}, "image_size: is not for model_type 'llava', whose processor decides"),
        ({"images_per_row": 2}, "images_per_row: 2 has no effect without images$"),
        ({"images": "i", "length": 576}, "length: 576 has no room for images of 576 tokens; use more than these"),
        ({"images": "i", "images_per_row": 2}, "length: 1024 has no room for images of 1152 tokens"),
        (
            {"images": "i", "model": "blind.json"},
            "images: model_type 'llama' is not trained on images, only gemma3, .*llava, .*$",
        ),
        (
            {"images": "i", "model": "any.json", "length": 64},
            "image_size: has to be said, as 1280x720: model_type 'qwen3_vl' sees images as large as they are$",
        ),
        (
            {"images": "i", "teacher": "other.json"},
            "teacher: other.json is of model_type 'gemma3', the model of 'llava': they are given images in different",
        ),
        ({"images": "i", "teacher": "blind.json"}, "teacher: blind.json sees no images, which the rows show$"),
    ],
)
def test_what_sees_no_images_is_refused(config, fields, reason, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blind = {**LLAVA["text_config"], "architectures": ["LlamaForCausalLM"]}
    (tmp_path / "blind.json").write_text(json.dumps(blind))
    text = {**TOWERS["gemma3"]["text_config"], "vocab_size": 32064, "max_position_embeddings": 4096}
    other = {**TOWERS["gemma3"], "model_type": "gemma3", "text_config": text}
    (tmp_path / "other.json").write_text(json.dumps(other))
    (tmp_path / "any.json").write_text(json.dumps({"model_type": "qwen3_vl", **TOWERS["qwen3_vl"]}))
    with pytest.raises(InputError, match=f"^{reason}"):
        planned(config, **fields)
