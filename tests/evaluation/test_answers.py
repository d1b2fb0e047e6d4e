"""The perplexity of answers about images, beside transformers' own class and processor."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoProcessor, LlavaForConditionalGeneration

from shardprune.errors import InputError
from tests.evaluation.material import evaluated, make_readable
from tests.support.running import run
from tests.support.seeing import make_conversations, make_seeing
from tests.support.tiny import make_tokens


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    folder = tmp_path_factory.mktemp("seen")
    make_seeing(folder / "model")
    make_conversations(folder)
    return folder


@torch.no_grad()
def one_answer(model, file, images):
    """The losses of the answers of conversations of one turn about one image."""
    processor = AutoProcessor.from_pretrained(model)
    loaded = LlavaForConditionalGeneration.from_pretrained(model).eval()
    found = []
    for row in json.loads(Path(file).read_text()):
        answer = row["conversations"][1]["value"]
        text = f"USER: <image>\nwhat ? ASSISTANT: {answer} </s>"
        inputs = processor(text=text, images=Image.open(images / row["image"]), return_tensors="pt")
        chances = loaded(**inputs).logits[0, :-1].log_softmax(1)
        found += (-chances.gather(1, inputs["input_ids"][0, 1:, None]))[-2:, 0].tolist()  # the word and the end
    return found


def measure(model, file, images, **fields):
    result = evaluated(model, answers=str(file), images=str(images), **fields)
    (measured,) = result.evaluation.answers.values()
    return measured


def test_answers_are_those_of_transformers_before_and_after_pruning(seen, tmp_path):
    rows = json.loads((seen / "conversations.json").read_text())
    plain = [row for row in rows if len(row["conversations"]) == 2 and isinstance(row.get("image"), str)]
    assert len(plain) > 3
    file = tmp_path / "plain.json"
    file.write_text(json.dumps(plain))
    make_tokens(tmp_path / "tokens.npy")
    run(tmp_path, "out", seen / "model", sparsity=0.5)
    values = []
    for model in (seen / "model", tmp_path / "out"):
        measured = measure(model, file, seen / "images", wave=2)
        losses = one_answer(model, file, seen / "images")
        assert measured.value == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-4)
        assert (measured.conversations, measured.images, measured.tokens) == (len(plain), len(plain), len(losses))
        values.append(measured.value)
    assert values[0] != pytest.approx(values[1], rel=1e-3)
    (tmp_path / "images").mkdir()
    for row in plain:
        Image.new("RGB", (9, 9), (0, 90, 250)).save(tmp_path / "images" / row["image"])
    assert measure(seen / "model", file, tmp_path / "images").value != pytest.approx(values[0], rel=3e-3)


def test_answers_of_a_ruined_model_have_an_infinite_perplexity(seen, tmp_path):
    shutil.copytree(seen / "model", tmp_path / "model")
    (file,) = (tmp_path / "model").glob("*.safetensors")
    tensors = load_file(file)
    (head,) = [name for name in tensors if name.endswith("lm_head.weight")]
    tensors[head] *= 1e6
    save_file(tensors, file, metadata={"format": "pt"})
    assert measure(tmp_path / "model", seen / "conversations.json", seen / "images").value == math.inf


def test_several_images_and_turns_are_measured_and_written(seen, tmp_path):
    fields = {"answers": str(seen / "conversations.json"), "images": str(seen / "images"), "out": str(tmp_path / "e")}
    result = evaluated(seen / "model", **fields)
    (measured,) = result.evaluation.answers.values()
    written = json.loads((tmp_path / "e" / "result.json").read_text())
    assert [one["value"] for one in written["evaluation"]["answers"].values()] == [measured.value]
    assert (measured.conversations, measured.images, measured.tokens) == (12, 12, 27)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": "nowhere"}, r"^answers: '.*nowhere/0\.png' does not exist$"),
        ({"answers": "text.json"}, r"^answers: '.*' holds no conversations about images$"),
        ({"model": "blind"}, r"^answers: '.*' holds conversations about images, and the model sees none$"),
    ],
)
def test_what_cannot_be_measured_is_refused(seen, change, message, tmp_path):
    make_readable(tmp_path / "blind")
    (tmp_path / "text.json").write_text(json.dumps([{"instruction": "one", "output": "two"}]))
    fields = {"model": seen / "model", "answers": seen / "conversations.json", "images": seen / "images"}
    for name, value in change.items():
        fields[name] = tmp_path / value
    fields = {name: str(value) for name, value in fields.items()}
    with pytest.raises(InputError, match=message):
        evaluated(**fields)


def test_a_processor_of_another_model_is_refused(seen, tmp_path):
    make_seeing(tmp_path / "model")
    file = tmp_path / "model" / "processor_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "patch_size": 2}))
    with pytest.raises(InputError, match=r"^model: .* has 4 features of images for 16 tokens that its processor"):
        evaluated(tmp_path / "model", answers=str(seen / "conversations.json"), images=str(seen / "images"))
