"""Tokens per second of a model, whole in this process, in turn with the one that it was made of; and what both write.

Prefill reads prompts of random tokens, decode adds one token at a time to them, greedily: both in transformers' own
code, without a serving engine's batching.
"""

import logging
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel
from transformers.quantizers import AutoQuantizationConfig

from shardprune.errors import InputError, OutOfMemory, first_line
from shardprune.evaluation.sharded import ShardedModel
from shardprune.model.auto_class import auto_class_of
from shardprune.model.checkpoint import Checkpoint, place_of
from shardprune.model.companions import has_tokenizer
from shardprune.model.config_file import raw_config
from shardprune.model.empty_model import attention_of
from shardprune.model.kept_keys import going_on, kept_argument
from shardprune.model.opening import open_model
from shardprune.recipes.evaluate import LatencyFields
from shardprune.report.progress import Reporter
from shardprune.report.result import Continuation, Latency, ModelWeights, Rate, Speed
from shardprune.storage.journal import recorded_recipe
from shardprune.storage.output_names import run_of

_logger = logging.getLogger(__name__)

THIS, DENSE, OTHER = "pruned", "dense", "beside"  # the model, that which its line began with, any other one
PROMPTS = (
    "The capital of France is",
    "Once upon a time, there was a",
    "def fibonacci(n):\n",
    "The three laws of thermodynamics say that",
    "Dear customer, thank you for",
)
WRITTEN = 24  # tokens of a continuation


@dataclass(frozen=True)
class Candidates:
    """The checkpoints that take turns, by name: the one that is measured, then the one `beside` it, if there is one."""

    checkpoints: dict[str, Checkpoint]
    parameters: dict[str, int]
    beside: str | None


def open_candidates(recipe: LatencyFields, model: ShardedModel) -> Candidates:
    """Open what a measurement needs.

    Raises:
        InputError: a model cannot be opened, lies where transformers does not load from, or its positions do not
            suffice.
    """
    place = model.checkpoint.folder.url
    original = original_of(place)
    beside = recipe.latency_beside or original
    if beside is None and _given_to(place):
        reason = "the model that its runs began with is not there any more"
        _logger.warning("the speed of %s is compared with no other: %s; --latency-beside names one", place, reason)
    checkpoints, parameters = {THIS: model.checkpoint}, {THIS: model.skeleton.parameters()}
    if beside:
        opened = open_model(place_of(beside), "latency_beside")
        name = DENSE if original and place_of(beside) == place_of(original) else OTHER
        checkpoints[name], parameters[name] = opened.checkpoint, opened.skeleton.parameters()
    length = recipe.latency_prompt + recipe.latency_tokens
    for checkpoint in checkpoints.values():
        if not (checkpoint.folder.local or checkpoint.folder.url.startswith("hf://")):
            raise InputError("latency", f"transformers does not load from {checkpoint.folder.url}; give a local copy")
        most = getattr(checkpoint.config, "max_position_embeddings", None) or length
        if length > most:
            raise InputError(
                "latency_prompt", f"{length} tokens with those of the answer; the model has {most} positions"
            )
    return Candidates(checkpoints, parameters, beside)


def original_of(out: str) -> str | None:
    """Return the model from which a line of runs that ends in an output began; None where that is not known, or not
    there any more."""
    found, seen = None, {out}
    while (model := _given_to(out)) and isinstance(model, str) and model not in seen:
        if model.startswith(("/", "~")) and not os.path.isdir(model):
            return None
        found = out = model
        seen.add(model)
        if not os.path.isdir(model) and "://" not in model:  # a name of the hub, where no run writes
            break
    return found


def _given_to(out: str) -> Any:
    """Return the model that was given to the run which made the one in a folder."""
    return (recorded_recipe(out) or recorded_recipe(run_of(out))).get("model")


def measure(recipe: LatencyFields, candidates: Candidates, model: ShardedModel, reporter: Reporter) -> Latency:
    """Measure the models in turn.

    Raises:
        InputError: transformers cannot load one.
        OutOfMemory: the device has no room for both, or for a batch.
    """
    device = torch.device(model.settings.device)
    with _threads(model.settings.threads), _room(recipe, device):
        loaded = {name: _load(own, model, device) for name, own in candidates.checkpoints.items()}
        speeds: list[Speed] = []
        with reporter.step("latency", len(recipe.latency_batches) * (recipe.latency_rounds + 1)) as step:
            for batch in recipe.latency_batches:
                speeds += _speeds(recipe, batch, loaded, device, lambda: step.advance(1))
        texts = _continuations(loaded, candidates, device)
    return Latency(
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        dtype=str(model.skeleton.dtype).removeprefix("torch."),
        threads=model.settings.threads or torch.get_num_threads(),
        prompt=recipe.latency_prompt,
        tokens=recipe.latency_tokens,
        rounds=recipe.latency_rounds,
        beside=candidates.beside,
        weights={
            name: ModelWeights(bytes=_bytes(own), parameters=candidates.parameters[name])
            for name, own in candidates.checkpoints.items()
        },
        speeds=speeds,
        continuations=texts,
    )


def _load(checkpoint: Checkpoint, model: ShardedModel, device: torch.device) -> PreTrainedModel:
    place = checkpoint.folder.url.removeprefix("hf://")
    try:
        loaded = getattr(transformers, auto_class_of(checkpoint.config.model_type)).from_pretrained(
            place,
            dtype=model.skeleton.dtype,
            trust_remote_code=False,
            attn_implementation=attention_of(checkpoint.config),
            **loading_of(checkpoint),
        )
    except (OSError, ValueError) as error:
        raise InputError("latency", f"transformers cannot load {place!r}: {first_line(error)}") from error
    return loaded.to(device).eval()


def loading_of(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return the arguments with which transformers multiplies FP8 weights with their scales, as shards do; none for
    other checkpoints."""
    if checkpoint.fp8 is None:
        return {}
    quantisation = AutoQuantizationConfig.from_dict(raw_config(checkpoint.folder)["quantization_config"])
    quantisation.dequantize = True
    return {"quantization_config": quantisation}


@torch.no_grad()
def _speeds(
    recipe: LatencyFields,
    batch: int,
    models: Mapping[str, PreTrainedModel],
    device: torch.device,
    advance: Callable[[], None],
) -> list[Speed]:
    """Return the speeds of all models at one size of batch; a first round is not counted."""
    known = min(model.get_input_embeddings().num_embeddings for model in models.values())
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, known, (batch, recipe.latency_prompt), generator=generator).to(device)
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
    for turn in range(recipe.latency_rounds + 1):
        for name, model in models.items():
            seconds = _answer(model, tokens, recipe.latency_tokens)
            if turn:
                taken[name].append(seconds)
        advance()
    read, written = tokens.numel(), batch * recipe.latency_tokens
    return [
        Speed(
            model=name,
            batch=batch,
            prefill=_rate(read, [first for first, _ in seconds]),
            decode=_rate(written, [second for _, second in seconds]),
        )
        for name, seconds in taken.items()
    ]


def _answer(model: Any, tokens: Tensor, count: int) -> tuple[float, float]:
    """Return the seconds of reading a prompt, and those of writing `count` tokens after it."""
    started = _now(tokens)
    output = model(tokens, use_cache=True, logits_to_keep=1)
    newest = output.logits[:, -1:].argmax(-1)
    between = _now(tokens)
    for place in range(count):
        output = _next(model, newest, output, tokens.shape[1] + place)
        newest = output.logits[:, -1:].argmax(-1)
    return between - started, _now(tokens) - between


def _next(model: Any, newest: Tensor, output: Any, seen: int) -> Any:
    """Return a model's output for the tokens after `seen` others, the last of which gave an output."""
    kept = output[kept_argument(model)]
    return model(newest, **going_on(model, kept, seen, newest.device))


def _now(tokens: Tensor) -> float:
    if tokens.is_cuda:
        torch.cuda.synchronize(tokens.device)
    return time.perf_counter()


def _rate(tokens: int, seconds: list[float]) -> Rate:
    rates = [tokens / max(one, 1e-9) for one in seconds]
    return Rate(median=statistics.median(rates), least=min(rates), most=max(rates))


@torch.no_grad()
def _continuations(
    models: Mapping[str, PreTrainedModel], candidates: Candidates, device: torch.device
) -> list[Continuation]:
    """Return what the models write after fixed prompts; none without a tokenizer."""
    checkpoint = candidates.checkpoints[THIS]
    if not has_tokenizer(checkpoint.folder):
        return []
    tokenizer = checkpoint.tokenizer()
    found = []
    for prompt in PROMPTS:
        tokens = tokenizer(prompt, return_tensors="pt").input_ids.long().to(device)
        if not tokens.numel():  # of a tokenizer without these words
            continue
        texts = {name: tokenizer.decode(_written(model, tokens)) for name, model in models.items()}
        after = texts.pop(THIS)
        found.append(Continuation(prompt=prompt, before=next(iter(texts.values()), None), after=after))
    return found


def _written(model: Any, tokens: Tensor) -> list[int]:
    """Return the tokens of greedy decoding, whatever the model's own settings of generation are."""
    output, written = model(tokens, use_cache=True), []
    for place in range(WRITTEN):
        newest = output.logits[:, -1:].argmax(-1)
        written.append(int(newest))
        output = _next(model, newest, output, tokens.shape[1] + place)
    return written


def _bytes(checkpoint: Checkpoint) -> int:
    return sum(math.prod(entry.shape) * entry.dtype.itemsize for entry in checkpoint.entries.values())


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _room(recipe: LatencyFields, device: torch.device) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        sizes = ", ".join(map(str, recipe.latency_batches))
        reason = f"{device} has no room for the models and batches of {sizes}"
        raise OutOfMemory(f"latency: {reason}; smaller --latency-batches or --latency-prompt help") from error
