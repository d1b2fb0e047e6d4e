"""Conversations about images in LLaVA's form, as examples to learn from.

FILE.json is a list of objects: `conversations`, a list of turns with `from` (human, gpt, or system) and the text
`value`; and `image`, the name of an image, or a list of names, where there are any. `<image>` in a turn of the human
stands for the next of them. The checkpoint's own chat template makes a text of it, and the loss counts the answers.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from shardprune.errors import InputError
from shardprune.extras import check_extra
from shardprune.model.processor import ImageText, Processor
from shardprune.recovery.row_images import ImageFile
from shardprune.recovery.rows import Example
from shardprune.storage.images import image_sizes
from shardprune.storage.locations import absolute
from shardprune.storage.tokenising import tokenise

MARK = "<image>"
ROLES = {"human": "user", "gpt": "assistant", "system": "system"}


class Conversation(NamedTuple):
    """A conversation of a source; `where` says in errors which.

    Attributes:
        messages: as chat templates take them.
        images: names, in the order in which the messages show them.
    """

    where: str
    messages: list[dict[str, Any]]
    images: tuple[str, ...]


def is_conversation(value: Any) -> bool:
    """Return whether an object of a source is a conversation, and not an instruction."""
    return isinstance(value, dict) and "conversations" in value


def conversation(where: str, value: Any) -> Conversation:
    """Return the conversation of an object of a source.

    Raises:
        InputError: it is none, or does not show each of its images once.
    """
    if not is_conversation(value) or not isinstance(value["conversations"], list):
        raise InputError("data", f"{where} is no object with a list of conversations")
    messages = [_message(where, turn) for turn in value["conversations"]]
    if not any(message["role"] == "assistant" for message in messages):
        raise InputError("data", f"{where} has no turn of gpt, from which to learn")
    named = value.get("image")
    names = named if isinstance(named, list) else [] if named is None else [named]
    if not all(isinstance(name, str) and _is_inside(name) for name in names):
        raise InputError("data", f"{where} has an image that is no path inside the folder of images")
    shown = sum(part["type"] == "image" for message in messages for part in message["content"])
    if shown != len(names):
        raise InputError("data", f"{where} has {len(names)} images and says {MARK} {shown} times; use one for each")
    return Conversation(where, messages, tuple(names))


def _message(where: str, turn: Any) -> dict[str, Any]:
    if not isinstance(turn, dict) or turn.get("from") not in ROLES or not isinstance(turn.get("value"), str):
        raise InputError("data", f"{where} has a turn without from ({', '.join(ROLES)}) and a text value")
    role, text = ROLES[turn["from"]], turn["value"]
    if role != "user":
        return {"role": role, "content": [{"type": "text", "text": text}]}
    content: list[dict[str, str]] = []
    for number, part in enumerate(text.split(MARK)):
        content += [{"type": "image"}] if number else []
        content += [{"type": "text", "text": part.strip()}] if part.strip() else []
    return {"role": role, "content": content}


def _is_inside(name: str) -> bool:
    return bool(name) and not name.startswith("/") and "://" not in name and ".." not in name.split("/")


class Conversations(tuple[Conversation, ...]):
    """The conversations of a source."""


@dataclass(frozen=True)
class Eyes:
    """What a model that sees images needs of conversations: its processor, which is opened when it is first needed, and
    the folder of the images; None: that of the conversations."""

    processor: Callable[[], Processor]
    folder: str | None

    def read(
        self, conversations: Conversations, source: str, length: int, prompt_loss: bool
    ) -> tuple[list[Example], list[ImageFile]]:
        """Return an example of each conversation, and the images that they show.

        An example ends at `length` tokens, or before the first image that would not be whole.

        Args:
            prompt_loss: learn what is no answer, too, but for the images.

        Raises:
            InputError: an image cannot be read, or the checkpoint's chat template cannot tell answers apart.
        """
        check_extra("images", "data")
        processor = self.processor()
        folder = absolute(self.folder or source.rpartition("/")[0] or ".").rstrip("/")
        names = list(dict.fromkeys(name for one in conversations for name in one.images))
        sizes = image_sizes([f"{folder}/{name}" for name in names], "data")
        files = [ImageFile(folder, name, *size) for name, size in zip(names, sizes, strict=True)]
        places = {name: place for place, name in enumerate(names)}
        made = []
        for one in conversations:
            shown = [places[name] for name in one.images]
            images = [processor.image_text(*sizes[place]) for place in shown]
            tokens, learned, fits = _tokens(one, processor, images, length, prompt_loss, source)
            made.append(Example(tokens, learned, tuple(shown[:fits])))
        return made, files


def _tokens(
    one: Conversation, processor: Processor, images: list[ImageText], length: int, prompt_loss: bool, source: str
) -> tuple[Tensor, Tensor, int]:
    """Return the tokens of a conversation, whether each is learned, and how many of its images they show."""
    text, answers, places = _with_images(one, processor, images)
    tokenizer = processor.tokenizer
    beginning = tokenizer.bos_token
    encoded = tokenise(
        lambda: tokenizer(
            text,
            return_offsets_mapping=True,
            add_special_tokens=not (beginning and text.startswith(beginning)),
            verbose=False,
        ),
        len(text),
        "data",
        repr(source),
    )
    ids = torch.tensor(encoded["input_ids"])
    bounds = torch.tensor(encoded["offset_mapping"])
    learned = torch.full(ids.shape, prompt_loss)
    for start, end in answers:
        learned |= _within(bounds, start, end)
    runs, marks = [run for image in images for run in image.runs], ids == processor.image_id
    if int(marks.sum()) != len(runs):
        token = tokenizer.convert_ids_to_tokens(processor.image_id)
        raise InputError("data", f"{one.where} says {token}, which stands for an image; leave it out")
    ending = tokenizer.eos_token_id  # a template may have it, and more behind it
    ended = (
        bool(((ids == ending) & (bounds[:, 0] >= answers[-1][0])).any()) if ending is not None and answers else False
    )
    repeats = torch.ones_like(ids)
    repeats[marks] = torch.tensor(runs, dtype=ids.dtype)
    ends = repeats.cumsum(0)
    size, fits = length, len(images)
    for number, (start, end) in enumerate(places):
        inside = _within(bounds, start, end).nonzero()[:, 0]
        learned[inside] = False
        if number < fits and ends[inside[-1]] > length:
            size, fits = int(ends[inside[0]] - repeats[inside[0]]), number
    ids, learned = ids.repeat_interleave(repeats), learned.repeat_interleave(repeats)
    if ending is not None and not ended and ids[-1] != ending:
        ids, learned = torch.cat([ids, torch.tensor([ending])]), torch.cat([learned, torch.tensor([True])])
    return ids[:size].int(), learned[:size], fits


def _within(bounds: Tensor, start: int, end: int) -> Tensor:
    """Return whether tokens, by their places in a text, have characters of a part of it, bool [tokens]."""
    return (bounds[:, 1] > start) & (bounds[:, 0] < end)


Span = tuple[int, int]  # the first character of a part of a text, and its end


def _with_images(
    one: Conversation, processor: Processor, images: list[ImageText]
) -> tuple[str, list[Span], list[Span]]:
    """Return a conversation as it is tokenised, with the places of its answers and of its images."""
    shown, answers = _shown(one, processor)
    pieces = shown.split(processor.image_token)
    if len(pieces) - 1 != len(images):
        reason = f"{one.where} shows {len(pieces) - 1} images by the checkpoint's chat template, and has {len(images)}"
        raise InputError("data", reason)
    text, passed = pieces[0], len(pieces[0])
    places: list[Span] = []
    moved = [(0, 0)]  # from which character on, and by how many
    for image, piece in zip(images, pieces[1:], strict=True):
        places.append((len(text), len(text) + len(image.text)))
        text, passed = text + image.text, passed + len(processor.image_token)
        moved.append((passed, len(text) - passed))
        text, passed = text + piece, passed + len(piece)
    by = [max(one for one in moved if one[0] <= start)[1] for start, _ in answers]
    return text, [(start + more, end + more) for (start, end), more in zip(answers, by, strict=True)], places


def _shown(one: Conversation, processor: Processor) -> tuple[str, list[tuple[int, int]]]:
    """Return a conversation as the chat template shows it, and the first character and the end of each answer."""
    messages = one.messages
    text = processor.shown(messages, opened=False)
    answers = []
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before, until = processor.shown(messages[:number], True), processor.shown(messages[: number + 1], False)
        if not until.startswith(before) or not text.startswith(until):
            reason = f"{one.where} does not begin by the checkpoint's chat template as the same without its end does"
            raise InputError("data", f"{reason}, so that its answers cannot be told apart")
        answers.append((len(before), len(until)))
    return text, answers
