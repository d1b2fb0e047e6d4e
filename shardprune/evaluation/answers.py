"""The perplexity of answers about images: the model is whole in this process, and its vision tower with it."""

import torch

from shardprune.errors import InputError, without_credentials
from shardprune.evaluation.sharded import ShardedModel
from shardprune.model.opening import OpenedModel
from shardprune.recipes.evaluate import AnswerFields
from shardprune.recovery.examples import load_rows
from shardprune.recovery.model import load_model, load_seeing
from shardprune.recovery.predictions import Reading, ahead, shows_images
from shardprune.recovery.rows import Rows
from shardprune.recovery.sight import check_vision, eyes_of
from shardprune.recovery.student import Student
from shardprune.report.result import MeasuredAnswers
from shardprune.shard.likelihoods import perplexity_of


def open_answers(recipe: AnswerFields, opened: OpenedModel) -> dict[str, Rows]:
    """Return the rows of every source of conversations, by its name without credentials.

    Raises:
        InputError: a source cannot be read, holds no conversations about images, or the model sees none.
    """
    found: dict[str, Rows] = {}
    eyes = eyes_of(opened.checkpoint, recipe.images)
    vocabulary = opened.skeleton.config.vocab_size
    for source in recipe.answers:
        try:
            rows = load_rows(source, opened.tokenizer, recipe.answers_length, False, False, vocabulary, eyes)
        except InputError as error:  # which names the field of training data
            raise InputError("answers" if error.field == "data" else error.field, error.problem) from error
        if not shows_images(rows):
            raise InputError("answers", f"{source!r} holds no conversations about images")
        check_vision(opened.checkpoint, rows)
        found[without_credentials(source)] = rows
    return found


@torch.no_grad()
def measure_answers(recipe: AnswerFields, model: ShardedModel, rows: Rows) -> MeasuredAnswers:
    """Return the perplexity of the answers in rows, on the device and in the dtype that shards would use."""
    settings, dtype = model.settings, model.skeleton.dtype
    device = torch.device(settings.device)
    if settings.threads:
        torch.set_num_threads(settings.threads)
    checkpoint = model.checkpoint
    language = load_model(checkpoint, device, dtype, None)
    student = Student(language, load_seeing(checkpoint, language, device, dtype)).eval()
    size = settings.wave or 1
    batches = [range(first, min(first + size, len(rows))) for first in range(0, len(rows), size)]
    total = torch.zeros((), dtype=torch.float64, device=device)
    with model.reporter.step("answers", len(batches)) as step:
        for batch in ahead(rows, batches, Reading.of(checkpoint, rows), device):
            total += student(batch)
            step.advance(1)
    checkpoint.check_unchanged()
    assert rows.images is not None
    tokens = rows.targets(range(len(rows)))
    return MeasuredAnswers(
        value=perplexity_of(float(total) / tokens),
        conversations=len(rows),
        images=len(rows.images.shown),
        tokens=tokens,
        length=recipe.answers_length,
        sha256=rows.digest(),
    )
