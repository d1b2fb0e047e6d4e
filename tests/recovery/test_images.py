"""Trainings on conversations about images: LLaVA's own processor and class give the same tokens and losses."""

import json
import math
import shutil
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration

from shardprune.errors import InputError
from shardprune.model.checkpoint import Checkpoint
from shardprune.recovery.examples import load_rows
from shardprune.recovery.mixing import joined
from shardprune.recovery.rows import Rows
from shardprune.recovery.sight import eyes_of
from shardprune.storage.folder import Folder
from tests.recovery.trainings import furthest, losses, train
from tests.support.seeing import TEMPLATE, WORDS, make_conversations, make_seeing
from tests.support.tiny import LLAVA_LAYOUTS, VOCABULARY, differing, load_tensors

STEPS = {"length": 64, "batch": 4, "steps": 6, "learning_rate": 1e-2, "warmup": 0.0, "schedule": "constant"}
PUBLISHED = {"lora_rank": 8, "lora_alpha": 16}


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """A folder with models in both layouts, images and conversations; and the options of a training on them."""
    folder = tmp_path_factory.mktemp("seen")
    for number, saving in enumerate(LLAVA_LAYOUTS.values()):
        make_seeing(folder / f"model{number}", **saving)
    data = make_conversations(folder)
    return folder, {"model": str(folder / "model0"), "data": data, "images": str(folder / "images"), **STEPS}


def rows_of(fields, length=64, prompt_loss=False):
    checkpoint = Checkpoint(fields["model"])
    eyes = eyes_of(checkpoint, fields["images"])
    return load_rows(fields["data"], checkpoint.tokenizer, length, False, prompt_loss, VOCABULARY, eyes)


processor_of = cache(AutoProcessor.from_pretrained)


def plain(fields, index):
    """What transformers' processor makes of a conversation: the model's inputs, and where an answer's words are."""
    processor = processor_of(fields["model"])
    row = json.loads(Path(fields["data"]).read_text())[index]
    text, answers, names = "", [], row.get("image", [])
    for turn in row["conversations"]:
        if turn["from"] == "gpt":
            answers.append((len(text) + len("ASSISTANT:"), len(text) + len(f"ASSISTANT: {turn['value']} ")))
            text += f"ASSISTANT: {turn['value']} "
        else:
            marks, words = turn["value"].count("<image>"), turn["value"].split("<image>")
            text += "USER: " + "<image>\n" * marks
            text += "".join(f"{part.strip()} " for part in words if part.strip())
    names = [names] if isinstance(names, str) else names
    images = [Image.open(Path(fields["images"], name)) for name in names] or None
    made = processor(text=text, images=images, return_tensors="pt")
    alone = processor.tokenizer(text, return_offsets_mapping=True)
    learned = []
    for token, (start, end) in zip(alone["input_ids"], alone["offset_mapping"], strict=True):
        within = any(start < stop and end > first for first, stop in answers)
        learned += [False] * 4 if token == VOCABULARY - 1 else [within]
    return {**made, "input_ids": torch.cat([made["input_ids"], torch.tensor([[2]])], 1)}, [*learned, True]


@torch.no_grad()
def plain_loss(path, fields, indices):
    """The mean loss of the answers' tokens, by transformers' own class, one conversation after the other."""
    model = LlavaForConditionalGeneration.from_pretrained(path).eval()
    total, count = 0.0, 0
    for index in indices:
        inputs, learned = plain(fields, index)
        inputs.pop("attention_mask")
        chances = model(**inputs).logits[0, :-1].log_softmax(1)
        places = torch.tensor(learned[1:])
        total -= float(chances.gather(1, inputs["input_ids"][0, 1:, None])[places].sum())
        count += int(places.sum())
    return total / count


def test_conversations_have_the_tokens_of_the_processor_and_learn_their_answers(seen):
    _, fields = seen
    rows = rows_of(fields)
    assert len(rows) == 12
    for index in range(len(rows)):
        inputs, learned = plain(fields, index)
        row = rows.row(index)
        assert row.tokens.tolist() == inputs["input_ids"][0].tolist()
        assert row.learned.tolist() == learned
    everything = rows_of(fields, prompt_loss=True)
    assert not everything.learned[everything.tokens == VOCABULARY - 1].any()
    assert int(everything.learned.sum()) == int((rows.tokens != VOCABULARY - 1).sum()) - len(rows)


def test_a_conversation_whose_template_ends_it_gets_no_second_end(seen, tmp_path):
    """As templates of Qwen's kind, which have a line's end behind the token."""
    _, fields = seen
    shutil.copytree(fields["model"], tmp_path / "model")
    ended = TEMPLATE.replace("{% endfor %}{% if add", "{{ '</s> : ' }}{% endfor %}{% if add")
    (tmp_path / "model" / "chat_template.jinja").write_text(ended)
    rows = rows_of({**fields, "model": str(tmp_path / "model")})
    plain_rows = rows_of(fields)
    end = WORDS.index("</s>")
    for index in range(len(rows)):
        tokens = rows.row(index).tokens.tolist()
        assert tokens[-2:] == [end, WORDS.index(":")]
        assert plain_rows.row(index).tokens.tolist()[-1] == end


def test_images_stay_with_their_rows(seen, tmp_path):
    _, fields = seen
    rows = rows_of(fields)
    names = [[file.name for file in rows.images.of_rows([row])] for row in range(len(rows))]
    assert names[:5] == [["0.png"], ["1.png"], ["2.png", "1.png"], ["3.png"], []]
    learned, held_out = rows.split(0.4, 0)
    rows.save(Folder(str(tmp_path), "state"), "rows.safetensors")
    loaded = Rows.load(Folder(str(tmp_path), "state"), "rows.safetensors")
    without = Rows.of([])
    for found in (loaded, joined([without, rows]), joined([held_out, learned])):
        chosen = {tuple(found.row(row).tokens.tolist()): row for row in range(len(found))}
        for row in range(len(rows)):
            other = chosen[tuple(rows.row(row).tokens.tolist())]
            assert len(found.images.of_rows([other])) == len(names[row])
    assert loaded.digest() == rows.digest() == joined([without, rows]).digest()
    assert rows.select([1, 0]).digest() != rows.select([0, 1]).digest()
    assert [file.name for file in rows.images.of_rows([2, 4, 0])] == ["2.png", "1.png", "0.png"]


def test_a_row_ends_before_an_image_that_would_not_be_whole(seen, tmp_path):
    _, fields = seen
    row = {
        "image": ["0.png", "1.png"],
        "conversations": [
            *({"from": "human", "value": "<image> what ?"}, {"from": "gpt", "value": "red"}),
            *({"from": "human", "value": "<image> what ?"}, {"from": "gpt", "value": "green"}),
        ],
    }
    (tmp_path / "two.json").write_text(json.dumps([row]))
    whole = rows_of({**fields, "data": str(tmp_path / "two.json")})
    second = whole.tokens.tolist().index(VOCABULARY - 1, 8)
    for length in (second, second + 3):
        cut = rows_of({**fields, "data": str(tmp_path / "two.json")}, length)
        assert cut.tokens.tolist() == whole.tokens.tolist()[:second]
        assert [file.name for file in cut.images.of_rows([0])] == ["0.png"]
    cut = rows_of({**fields, "data": str(tmp_path / "two.json")}, second + 4)
    assert len(cut.images.of_rows([0])) == 2


@pytest.mark.parametrize(
    "prefix", [pytest.param(prefix, marks=[pytest.mark.long] * place) for place, prefix in enumerate(LLAVA_LAYOUTS)]
)
def test_a_llava_learns_answers_and_its_tower_stays(folder, seen, prefix, tmp_path):
    place, fields = seen
    model = place / f"model{list(LLAVA_LAYOUTS).index(prefix)}"
    steps = {"steps": 3, "batch": 12, "micro_batch": 3}
    result = train(folder, tmp_path / "o", **{**fields, **PUBLISHED, **steps, "model": str(model), "lora_dropout": 0.0})
    before, after = plain_loss(model, fields, range(12)), plain_loss(tmp_path / "o", fields, range(12))
    assert losses(result)[0] == pytest.approx(before, rel=1e-5)
    assert math.exp(after) < 0.7 * math.exp(before)
    old, new = load_tensors(model), load_tensors(tmp_path / "o")
    assert old.keys() == new.keys()
    for name, tensor in new.items():
        projection = name.startswith(f"{prefix}layers.") and "_proj" in name
        assert torch.equal(tensor, old[name]) != projection, name
    for name in ("config.json", "processor_config.json", "chat_template.jinja"):
        assert (tmp_path / "o" / name).read_bytes() == (model / name).read_bytes()


@pytest.mark.long
@pytest.mark.parametrize("zero", [2, 3])
def test_two_processes_learn_the_same(folder, seen, pair, zero, tmp_path):
    _, fields = seen
    way = {"full": True, "recompute": True} if zero == 3 else {**PUBLISHED, "lora_dropout": 0.0}
    fields = {**fields, **way, "micro_batch": 2, "held_out": 0.2, "evaluate_every": 3}
    alone = train(folder, tmp_path / "alone", zero=1, **fields)
    both = train(folder, tmp_path / "both", pair, zero=zero, **fields)
    assert losses(both) == pytest.approx(losses(alone), rel=1e-4)
    held_out = [[one.held_out for one in result.recovery.losses if one.held_out] for result in (alone, both)]
    assert held_out[0] == pytest.approx(held_out[1], rel=1e-4)
    assert furthest(tmp_path / "alone", tmp_path / "both") < 1e-3


@pytest.mark.parametrize("top", [None, 5])
def test_a_teacher_sees_the_images(folder, seen, top, tmp_path):
    _, fields = seen
    taught = {"teacher": fields["model"], "teacher_weight": 1.0, "temperature": 1.0, "lora_dropout": 0.0}
    result = train(folder, tmp_path / "o", **{**fields, **taught, "steps": 1, "teacher_top": top})
    assert losses(result)[0] == pytest.approx(0, abs=1e-3 if top else 1e-6)  # the student is its teacher


def test_a_changed_image_folder_is_another_training_but_a_moved_one_is_not(seen):
    _, fields = seen
    rows = rows_of(fields)
    file = rows.images.files[0]
    for change, same in (({"folder": "/elsewhere"}, True), ({"width": 9}, False), ({"name": "other.png"}, False)):
        files = (file._replace(**change), *rows.images.files[1:])
        other = replace(rows, images=replace(rows.images, files=files))
        assert (other.digest() == rows.digest()) == same


ASKED, ANSWERED = {"from": "human", "value": "<image> what ?"}, {"from": "gpt", "value": "red"}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"conversations": "red"}, "is no object with a list of conversations"),
        ({"image": "0.png", "conversations": [ASKED]}, "has no turn of gpt, from which to learn"),
        ({"conversations": [ASKED, ANSWERED]}, "has 0 images and says <image> 1 times; use one for each"),
        ({"image": ["0.png"] * 2, "conversations": [ASKED, ANSWERED]}, "has 2 images and says <image> 1 times"),
        ({"image": "../0.png", "conversations": [ASKED, ANSWERED]}, "has an image that is no path inside the folder"),
        ({"image": "/0.png", "conversations": [ASKED, ANSWERED]}, "has an image that is no path inside the folder"),
        ({"image": 3, "conversations": [ASKED, ANSWERED]}, "has an image that is no path inside the folder"),
        ({"image": "0.png", "conversations": [ASKED, {"from": "bot", "value": "red"}]}, "has a turn without from"),
        ({"image": "0.png", "conversations": [ASKED, {"from": "gpt"}]}, "has a turn without from"),
        ({"image": "gone.png", "conversations": [ASKED, ANSWERED]}, r"'.*/images/gone\.png' does not exist"),
        ({"image": "bad.png", "conversations": [ASKED, ANSWERED]}, r"'.*/images/bad\.png' is no image"),
    ],
)
def test_bad_conversations_are_named(seen, row, message, tmp_path):
    folder, fields = seen
    (folder / "images" / "bad.png").write_bytes(b"\x89PNG no more")
    good = {"conversations": [{"from": "human", "value": "what ?"}, ANSWERED]}
    (tmp_path / "data.json").write_text(json.dumps([good, row]))
    with pytest.raises(InputError, match=rf"^data: .*{message}"):
        rows_of({**fields, "data": str(tmp_path / "data.json")})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"packing": True}, "^packing: puts no conversations about images into one row"),
        ({"images": None}, r"^data: '.*/0\.png' does not exist$"),
        ({"data": "text.json"}, r"^images: '.*' has no effect without conversations about images$"),
        ({"model": "{folder}/sparse"}, "^data: .* holds conversations about images, and the model sees none$"),
        ({"teacher": "{folder}/dense"}, "^teacher: .*"),
        ({"length": 6}, "^data: .* has no tokens left to learn at length 6; use a longer length$"),
    ],
)
def test_what_cannot_be_learned_is_refused(folder, seen, change, message, tmp_path):
    _, fields = seen
    (tmp_path / "text.json").write_text(json.dumps([{"instruction": "what", "output": "red"}]))
    if "data" in change:
        change = {"data": str(tmp_path / "text.json")}
    change = {name: value.format(folder=folder) if isinstance(value, str) else value for name, value in change.items()}
    with pytest.raises(InputError, match=message):
        train(folder, tmp_path / "o", **{**fields, **change})
    assert not (tmp_path / "o").exists()


def test_a_training_that_was_cut_off_goes_on_to_the_bit(folder, seen, pair, tmp_path):
    _, fields = seen
    fields = {**fields, **PUBLISHED, "micro_batch": 2, "zero": 2, "checkpoint_every": 2}
    whole = train(folder, tmp_path / "whole", pair, **fields)
    pair.cut_after = 2
    try:
        with pytest.raises(KeyboardInterrupt):
            train(folder, tmp_path / "o", pair, **fields)
    finally:
        pair.cut_after = None
    resumed = train(folder, tmp_path / "o", pair, **fields)
    assert losses(resumed) == losses(whole)
    assert differing(tmp_path / "o", tmp_path / "whole") == []
