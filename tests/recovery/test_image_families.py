"""Trainings on conversations about images beside each family's own processor and class."""

import json
import math
import re
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText

from shardprune.errors import InputError
from shardprune.model.checkpoint import Checkpoint
from shardprune.model.processor import Processor
from shardprune.recovery.examples import load_rows
from shardprune.recovery.model import load_model, load_seeing
from shardprune.recovery.predictions import PredictionBatch, Reading
from shardprune.recovery.sight import check_vision, eyes_of
from shardprune.recovery.student import Student
from shardprune.storage.images import blank_image
from tests.evaluation.material import evaluated
from tests.recovery.trainings import furthest, losses, train
from tests.support.seeing import QWEN, TOKENS, WORDS, family_processor, make_conversations, make_seeing_family
from tests.support.tiny import VOCABULARY, load_tensors
from tests.support.towers import make_tower

CPU = torch.device("cpu")
LEARNING = {
    **{"length": 64, "batch": 12, "micro_batch": 3, "steps": 3, "learning_rate": 1e-2, "warmup": 0.0},
    **{"schedule": "constant", "lora_rank": 8, "lora_alpha": 16, "lora_dropout": 0.0},
}
SEES = re.compile("visual|vision|projector")
REPEATING = {"qwen2_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe"}  # what others show
FAMILIES = [pytest.param(name, marks=[pytest.mark.long] * (name in REPEATING)) for name in sorted(TOKENS)]


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """A folder with conversations about images; and makes the model of a family."""
    folder = tmp_path_factory.mktemp("families")
    data = make_conversations(folder)

    @cache
    def made(model_type):
        if model_type == "mistral3":
            pytest.importorskip("torchvision", reason="its processor needs it")
        model = make_seeing_family(folder / model_type, model_type)
        return {"model": model, "data": data, "images": str(folder / "images"), **LEARNING}

    return made


def plain(fields, row):
    """What a family's processor makes of a conversation, and which of its tokens are answers."""
    processor = family_processor(Path(fields["model"]))
    messages = []
    for turn in row["conversations"]:
        parts = turn["value"].split("<image>")
        content = [{"type": "image"}] * (len(parts) - 1)
        content += [{"type": "text", "text": part.strip()} for part in parts if part.strip()]
        messages.append({"role": "assistant" if turn["from"] == "gpt" else "user", "content": content})
    names = row.get("image", [])
    images = [Image.open(Path(fields["images"], name)) for name in ([names] if isinstance(names, str) else names)]
    text = processor.apply_chat_template(messages, tokenize=False)
    inputs = processor(text=[text], images=images or None, return_tensors="pt")
    ids, answering, learned = inputs["input_ids"][0].tolist(), False, []
    for place, token in enumerate(ids):
        if token == WORDS.index("USER"):
            answering = False
        learned.append(answering)
        answering = answering or ids[place - 1 : place + 1] == [WORDS.index("ASSISTANT"), WORDS.index(":")]
    for name in inputs:  # and the end, which the template leaves out
        if name.endswith("token_type_ids") or name in ("input_ids", "attention_mask"):
            end = {"input_ids": 2, "attention_mask": 1}.get(name, 0)
            inputs[name] = torch.cat([inputs[name], torch.tensor([[end]])], 1)
    return inputs, [*learned, True]


@torch.no_grad()
def plain_losses(model, fields):
    """The summed loss of each conversation's answers, and the number of their tokens, by the family's own class."""
    whole = AutoModelForImageTextToText.from_pretrained(model).eval()
    found = []
    for row in json.loads(Path(fields["data"]).read_text()):
        inputs, learned = plain(fields, row)
        chances = whole(**inputs).logits[0, :-1].log_softmax(1)
        places = torch.tensor(learned[1:])
        found.append((-float(chances.gather(1, inputs["input_ids"][0, 1:, None])[places].sum()), int(places.sum())))
    return found


def mean(found):
    return sum(loss for loss, _ in found) / sum(count for _, count in found)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_family_learns_as_its_own_class_and_its_tower_stays(folder, seen, model_type, tmp_path):
    fields = seen(model_type)
    before = plain_losses(fields["model"], fields)
    result = train(folder, tmp_path / "o", **fields)
    after = plain_losses(tmp_path / "o", fields)
    assert losses(result)[0] == pytest.approx(mean(before), rel=1e-5)
    assert mean(after) < mean(before) - 0.3
    for model, expected in ((fields["model"], before), (tmp_path / "o", after)):
        assert conversations_alone(model, fields) == pytest.approx([loss for loss, _ in expected], rel=1e-5)
    (measured,) = evaluated(
        tmp_path / "o", answers=fields["data"], images=fields["images"], wave=4
    ).evaluation.answers.values()
    assert measured.value == pytest.approx(math.exp(mean(after)), rel=1e-5)
    old, new = load_tensors(Path(fields["model"])), load_tensors(tmp_path / "o")
    assert old.keys() == new.keys()
    changed = {name for name, tensor in new.items() if not torch.equal(tensor, old[name])}
    assert changed
    assert all("_proj" in name and not SEES.search(name) for name in changed), changed
    _, loading = AutoModelForImageTextToText.from_pretrained(tmp_path / "o", output_loading_info=True)
    assert not any(loading.values()), loading


@pytest.mark.long
@pytest.mark.parametrize("model_type", ["gemma3", "qwen3_vl"])
def test_recomputed_layers_of_two_processes_learn_the_same(folder, seen, pair, model_type, tmp_path):
    fields = {**seen(model_type), "micro_batch": 2}
    alone = train(folder, tmp_path / "alone", zero=1, **fields)
    both = train(folder, tmp_path / "both", pair, zero=3, recompute=True, **fields)
    assert losses(both) == pytest.approx(losses(alone), rel=1e-4)
    assert furthest(tmp_path / "alone", tmp_path / "both") < 1e-3


@torch.no_grad()
def conversations_alone(model, fields):
    """The summed loss of each conversation's answers, one after the other."""
    checkpoint = Checkpoint(str(model))
    rows = rows_of(checkpoint, fields)
    language = load_model(checkpoint, CPU, torch.float32, None)
    student = Student(language, load_seeing(checkpoint, language, CPU, torch.float32)).eval()
    reading = Reading.of(checkpoint, rows)
    return [float(student(PredictionBatch.of(rows, [row], reading))) for row in range(len(rows))]


def rows_of(checkpoint, fields, length=64, prompt_loss=False):
    eyes = eyes_of(checkpoint, fields["images"])
    return load_rows(fields["data"], checkpoint.tokenizer, length, False, prompt_loss, VOCABULARY, eyes)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_rows_have_the_tokens_of_the_processor_and_the_tower_a_feature_for_each(seen, model_type):
    fields = seen(model_type)
    checkpoint = Checkpoint(fields["model"])
    rows = rows_of(checkpoint, fields)
    conversations = json.loads(Path(fields["data"]).read_text())
    assert len(rows) == len(conversations)
    for index, row in enumerate(conversations):
        inputs, learned = plain(fields, row)
        assert rows.row(index).tokens.tolist() == inputs["input_ids"][0].tolist()
        assert rows.row(index).learned.tolist() == learned
    everything = rows_of(checkpoint, fields, prompt_loss=True)
    around = 0 if model_type in QWEN else len(TOKENS[model_type]) - 1  # with Qwen's, which the template writes
    special = torch.arange(VOCABULARY - 1 - around, VOCABULARY, dtype=torch.int32)
    assert not everything.learned[torch.isin(everything.tokens, special)].any()
    check_vision(checkpoint, rows)


@pytest.mark.skipif(find_spec("torchvision") is not None, reason="torchvision is installed")
def test_a_processor_that_needs_torchvision_is_named_without_it(seen, tmp_path):
    make_tower(tmp_path, "mistral3")
    (tmp_path / "processor_config.json").write_text('{"processor_class": "PixtralProcessor"}')
    message = r"^model: .*/.* holds no processor that loads: .*\b[Tt]orchvision\b"
    with pytest.raises(InputError, match=message):
        rows_of(Checkpoint(str(tmp_path)), seen("gemma3"))


def test_a_teacher_that_is_given_images_otherwise_is_refused(folder, seen, tmp_path):
    message = (
        "^teacher: .* is of model_type 'qwen3_vl', the model of 'qwen2_5_vl': they are given images in different ways$"
    )
    with pytest.raises(InputError, match=message):
        train(folder, tmp_path / "o", **seen("qwen2_5_vl"), teacher=seen("qwen3_vl")["model"])
    assert not (tmp_path / "o").exists()


def test_long_texts_of_images_are_not_warned_of(seen, caplog):
    checkpoint = Checkpoint(seen("gemma3")["model"])
    processor = Processor(checkpoint.folder, checkpoint.whole_config)
    processor.tokenizer.model_max_length = 8
    assert len(processor.pixels([blank_image(8, 8)] * 4)["pixel_values"]) == 4
    assert processor.image_text(8, 8).runs == (4,)
    assert "longer than" not in caplog.text


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_row_ends_before_an_image_that_would_not_be_whole(seen, model_type):
    fields = seen(model_type)
    checkpoint = Checkpoint(fields["model"])
    whole = rows_of(checkpoint, fields, prompt_loss=True)
    image = VOCABULARY - 1
    row = next(row for row in range(len(whole)) if len(whole.images.row(row)) == 2)
    tokens = whole.row(row).tokens.tolist()
    place = len(tokens) - 1 - tokens[::-1].index(image)  # the last token of the second image's features
    cut = rows_of(checkpoint, fields, place, prompt_loss=True)
    shortened = cut.row(row).tokens.tolist()
    assert len(cut.images.row(row)) == 1
    assert shortened == tokens[: len(shortened)]
    assert image in shortened
    assert len(shortened) < place
