"""Tasks that show images, answered by lm-eval's own model for them: as by transformers' class and processor."""

import pytest
import torch
import yaml
from datasets import Dataset
from datasets import Image as Images
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from shardprune.errors import InputError
from tests.evaluation.material import evaluated, make_readable, write_task
from tests.support.seeing import WORDS, make_conversations, make_seeing, make_seeing_family

QUESTION = "USER : <image> what ? ASSISTANT :"
TASK = {
    "task": "colours",
    "dataset_path": "parquet",
    "test_split": "test",
    "output_type": "generate_until",
    "doc_to_image": ["image"],
    "doc_to_text": "question",
    "doc_to_target": "answer",
    "generation_kwargs": {"until": ["."], "max_gen_toks": 3},
    "metric_list": [{"metric": "exact_match"}],
}


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """A model that sees, and a task whose expected answers are the model's own for all documents but the first."""
    folder = tmp_path_factory.mktemp("seen")
    make_seeing(folder / "model")
    return make_task(folder)


def make_task(folder):
    """Make the task for the model in a folder, whose words are then colours."""
    say_colours(folder / "model" / "model.safetensors")
    make_conversations(folder)
    images = [str(folder / "images" / f"{number}.png") for number in range(6)]
    answers = ["another", *(written(folder / "model", image) for image in images[1:])]
    assert len(set(answers)) > 2, "the images make no difference"
    rows = {"image": images, "question": [QUESTION] * 6, "answer": answers}
    Dataset.from_dict(rows).cast_column("image", Images()).to_parquet(folder / "colours.parquet")
    write(folder / "tasks", folder)
    return folder


def say_colours(file):
    """Leave only words of colours in the head, as other tokens are no text, and let what is seen count for more."""
    tensors = load_file(file)
    head = "lm_head.weight" if any("lm_head" in name for name in tensors) else ".embed_tokens.weight"
    for name, tensor in tensors.items():
        if name.endswith(head):
            tensor[: WORDS.index("red")] = 0
            tensor[len(WORDS) :] = 0
        if "projector" in name:
            tensor *= 4
    save_file(tensors, file, {"format": "pt"})


def write(place, folder, **fields):
    place.mkdir()
    task = {**TASK, "dataset_kwargs": {"data_files": {"test": str(folder / "colours.parquet")}}, **fields}
    (place / f"{task['task']}.yaml").write_text(yaml.safe_dump(task))


@torch.no_grad()
def written(model, image) -> str:
    processor = AutoProcessor.from_pretrained(model)
    loaded = AutoModelForImageTextToText.from_pretrained(model).eval()
    question = QUESTION.replace("<image>", processor.image_token)
    inputs = processor(text=question, images=Image.open(image), return_tensors="pt")
    tokens = loaded.generate(**inputs, max_new_tokens=3, do_sample=False)
    return processor.tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


@pytest.mark.parametrize("wave", [None, 4])
def test_answers_are_those_of_transformers(seen, wave):
    result = evaluated(seen / "model", tasks="colours", tasks_dir=str(seen / "tasks"), engine="hf", wave=wave)
    found = result.evaluation.tasks["colours"]
    assert found.metrics["exact_match"].value == pytest.approx(5 / 6)
    assert found.samples == 6


def test_a_processor_may_look_for_another_token_than_that_of_a_feature(tmp_path):
    make_seeing_family(tmp_path / "model", "gemma3")
    make_task(tmp_path)
    result = evaluated(tmp_path / "model", tasks="colours", tasks_dir=str(tmp_path / "tasks"), engine="hf")
    assert result.evaluation.tasks["colours"].metrics["exact_match"].value == pytest.approx(5 / 6)


def test_a_task_of_text_is_answered_beside_it(seen, tmp_path):
    write(tmp_path / "tasks", seen)
    write_task(tmp_path / "tasks", "pairs")
    names = "colours,pairs"
    both = evaluated(seen / "model", tasks=names, tasks_dir=str(tmp_path / "tasks"), engine="hf").evaluation.tasks
    alone = evaluated(seen / "model", tasks="pairs", tasks_dir=str(tmp_path / "tasks")).evaluation.tasks
    assert both["pairs"].metrics["acc"].value == alone["pairs"].metrics["acc"].value
    assert both["colours"].metrics["exact_match"].value == pytest.approx(5 / 6)


@pytest.mark.parametrize(
    ("fields", "engine", "message"),
    [
        ({}, "shards", "^tasks: 'colours' shows images, which shards do not see; use --engine hf$"),
        (
            {"output_type": "multiple_choice", "doc_to_choice": ["red", "blue"], "doc_to_target": 0},
            "hf",
            "scores given",
        ),
        ({"doc_to_audio": ["image"]}, "hf", "^tasks: 'colours' plays sounds; use a task of texts and images$"),
    ],
)
def test_what_cannot_be_answered_is_refused(seen, fields, engine, message, tmp_path):
    write(tmp_path / "tasks", seen, **fields)
    with pytest.raises(InputError, match=message):
        evaluated(seen / "model", tasks="colours", tasks_dir=str(tmp_path / "tasks"), engine=engine)


def test_a_model_that_sees_nothing_is_refused(seen, tmp_path):
    with pytest.raises(InputError, match="^tasks: 'colours' shows images, and the model sees none$"):
        evaluated(make_readable(tmp_path / "m"), tasks="colours", tasks_dir=str(seen / "tasks"), engine="hf")
