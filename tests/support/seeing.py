"""Tiny models that see, with their processors, images, and conversations about them."""

import json
from pathlib import Path

import numpy as np
import transformers
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, CLIPImageProcessor, LlavaProcessor, PreTrainedTokenizerFast, ProcessorMixin
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.pixtral.image_processing_pil_pixtral import PixtralImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from tests.support.tiny import VOCABULARY, make_llava
from tests.support.towers import make_tower

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


# Of the other families: their names for tokens, from the last of the vocabulary on, as their configs have them.
TOKENS = {
    "gemma3": {"image_token": "<image>", "boi_token": "<start>", "eoi_token": "<end>"},
    "internvl": {
        **{"context_image_token": "<image>", "start_image_token": "<start>", "end_image_token": "<end>"},
        "video_token": "<video>",
    },
    "mistral3": {"image_token": "<image>", "image_break_token": "<break>", "image_end_token": "<end>"},
}
QWEN = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe")
_OF_QWEN = {
    **{"image_token": "<image>", "video_token": "<video>"},
    **{"vision_start_token": "<start>", "vision_end_token": "<end>"},
}
TOKENS |= dict.fromkeys(QWEN, _OF_QWEN)
LINES = ("\n", "\n\n", "\n\n\n", "\n\n\n\n")
TILE = 16  # pixels of a side of an image, or of a part of it


def make_seeing_family(folder: Path, model_type: str, **parts: dict) -> str:
    """Save a tiny random model of a family other than LLaVA's, and its processor. Lines that end are tokens of their
    tokenizer, so that those around an image may become one."""
    make_tower(folder, model_type, **parts)
    names = TOKENS[model_type]
    _processor(folder, model_type, _tokenizer(names), names).save_pretrained(folder)
    return str(folder)


def _tokenizer(names: dict[str, str]) -> PreTrainedTokenizerFast:
    words = [*WORDS, *LINES]
    special = {token: VOCABULARY - place for place, token in enumerate(names.values(), start=1)}
    vocabulary = {word: place for place, word in enumerate(words)} | special
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(" +"), "removed"), pre_tokenizers.Split(Regex("\n+|[?:]"), "isolated")]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=made,
        **{"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"},
        extra_special_tokens=names,
    )
    tokenizer.add_tokens(words)  # which stay where a family's own class makes the rest anew (Qwen3.5)
    return tokenizer


def _processor(
    folder: Path, model_type: str, tokenizer: PreTrainedTokenizerFast, names: dict[str, str]
) -> ProcessorMixin:
    square = {"height": TILE, "width": TILE}
    if model_type == "gemma3":
        images = Gemma3ImageProcessorPil(size={"height": 8, "width": 8})
        shown = {"chat_template": TEMPLATE.replace("<image>", "<start>"), "image_seq_length": 4}
        return transformers.Gemma3Processor(images, tokenizer, **shown)
    if model_type == "internvl":
        images = GotOcr2ImageProcessorPil(size=square, max_patches=2)
        shown = {"chat_template": TEMPLATE, "image_seq_length": 4}
        return without_videos(transformers.InternVLProcessor)(images, tokenizer, **shown)
    if model_type in QWEN:
        patch = AutoConfig.from_pretrained(folder).vision_config.patch_size
        sizes = {"shortest_edge": (4 * patch) ** 2, "longest_edge": 6 * (2 * patch) ** 2}  # 4 to 6 tokens
        images = Qwen2VLImageProcessorPil(size=sizes, patch_size=patch, merge_size=2, temporal_patch_size=2)
        family = PROCESSOR_MAPPING[CONFIG_MAPPING[model_type]]
        return without_videos(family)(
            images, tokenizer, chat_template=TEMPLATE.replace("<image>", "<start><image><end>")
        )
    images = PixtralImageProcessorPil(size={"longest_edge": TILE}, patch_size=2)
    sizes = {"patch_size": 2, "spatial_merge_size": 2}
    return transformers.PixtralProcessor(images, tokenizer, chat_template=TEMPLATE, **sizes, **names)


def without_videos(family: type[ProcessorMixin]) -> type[ProcessorMixin]:
    """A family's class of processors without the part that reads videos, which needs torchvision."""
    kept = [name for name in family.get_attributes() if name != "video_processor"]
    return type(family.__name__, (family,), {"get_attributes": classmethod(lambda _: kept)})


def family_processor(folder: Path) -> ProcessorMixin:
    """The processor of a checkpoint's family, by its own class."""
    name = json.loads((Path(folder) / "processor_config.json").read_text())["processor_class"]
    return without_videos(getattr(transformers, name)).from_pretrained(folder)


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
