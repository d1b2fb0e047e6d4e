"""A tiny LLaVA with a processor, images, and conversations about them."""

import json
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import CLIPImageProcessor, LlavaProcessor, PreTrainedTokenizerFast

from tests.support.tiny import VOCABULARY, make_llava

WORDS = ["<unk>", "<s>", "</s>", "USER", "ASSISTANT", ":", "what", "?", "red", "green", "blue", "and", "dark", "light"]
# The texts of LLaVA-1.5's template in transformers' conversion: images first, a space behind every text.
TEMPLATE = (
    "{% for m in messages %}{{ m['role'].upper() + ': ' }}"
    "{% for c in m['content'] if c['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for c in m['content'] if c['type'] == 'text' %}{{ c['text'] + ' ' }}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
SIZES = [(8, 8), (12, 8), (9, 16), (20, 11)]


def make_seeing(folder: Path, vision: dict | None = None, **making) -> str:
    """Save a tiny random LLaVA, of 4 tokens an image unless fields of its tower say otherwise, and its processor."""
    make_llava(folder, vision=vision, **making)
    side = (vision or {}).get("image_size", 8)
    vocabulary = {word: place for place, word in enumerate(WORDS)} | {"<image>": VOCABULARY - 1}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=made,
        **{"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"},
        additional_special_tokens=["<image>"],
    )
    images = CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    LlavaProcessor(
        images,
        tokenizer,
        patch_size=4,
        num_additional_image_tokens=1,
        vision_feature_select_strategy="default",
        chat_template=TEMPLATE,
    ).save_pretrained(folder)
    return str(folder)


def make_conversations(folder: Path, count: int = 12) -> str:
    """Save images of one colour each below `folder`/images, and conversations about them: most about one, some about
    two or none, some in two turns."""
    from PIL import Image

    draw = np.random.default_rng(0)
    (folder / "images").mkdir(parents=True)
    rows = []
    for number in range(count):
        colour = number % 3
        pixels = np.zeros((*SIZES[number % len(SIZES)][::-1], 3), np.uint8)
        pixels[..., colour] = draw.integers(128, 256)
        Image.fromarray(pixels).save(folder / "images" / f"{number}.png")
        turns = [_turn("human", "<image>\nwhat ?"), _turn("gpt", WORDS[8 + colour])]
        row = {"id": str(number), "image": f"{number}.png", "conversations": turns}
        if number % 4 == 1:
            turns += [_turn("human", "what and ?"), _turn("gpt", "light")]
        if number % 6 == 2:
            row["image"] = [f"{number}.png", f"{number - 1}.png"]
            turns[0] = _turn("human", "<image> and <image> what ?")
        if number % 6 == 4:
            turns[0] = _turn("human", "what ?")
            del row["image"]
        rows.append(row)
    file = folder / "conversations.json"
    file.write_text(json.dumps(rows))
    return str(file)


def _turn(speaker: str, text: str) -> dict[str, str]:
    return {"from": speaker, "value": text}
