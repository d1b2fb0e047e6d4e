"""What a checkpoint's model needs to learn from rows that show images, checked before it is loaded."""

from functools import cache

import torch
from torch import Tensor

from shardprune.errors import InputError
from shardprune.model.checkpoint import Checkpoint
from shardprune.model.config_file import in_one_line
from shardprune.model.meta_device import META
from shardprune.model.processor import Processor
from shardprune.model.vision import StoredVision, check_seeing
from shardprune.recovery.conversations import Eyes
from shardprune.recovery.rows import Rows
from shardprune.storage.images import blank_image


def eyes_of(checkpoint: Checkpoint, folder: str | None) -> Eyes | None:
    """Return what a checkpoint's model needs of conversations about images in a folder; None if it sees none."""

    @cache
    def processor() -> Processor:
        check_seeing(checkpoint.whole_config, "data")
        return Processor(checkpoint.folder, checkpoint.whole_config)

    return Eyes(processor, folder) if checkpoint.has_tower else None


def check_vision(checkpoint: Checkpoint, rows: Rows) -> None:
    """Check that a checkpoint's vision tower has a feature for every token that stands for an image in rows.

    Raises:
        InputError: it has not; names the folder's field.
    """
    assert rows.images is not None
    vision = StoredVision(checkpoint, torch.float32, META)
    processor = Processor(checkpoint.folder, checkpoint.whole_config)
    row = next(row for row in range(len(rows)) if rows.images.row(row))
    files = rows.images.of_rows([row])
    tokens = int((rows.row(row).tokens == processor.image_id).sum())
    try:
        blank = [blank_image(file.width, file.height) for file in files]
        features = sum(vision.features_on_meta(processor.pixels(blank)))
    except Exception as error:  # of settings that are not those of the model, in any class
        reason = f"holds a processor whose images the model does not take: {in_one_line(error)}"
        raise InputError(checkpoint.folder.field, f"{checkpoint.folder.url} {reason}") from error
    if tokens != features:
        reason = f"has {features} features of images for {tokens} tokens that its processor makes of them"
        raise InputError(checkpoint.folder.field, f"{checkpoint.folder.url} {reason}; see its processor's settings")


def most_shown(checkpoint: Checkpoint, *parts: Rows) -> dict[str, Tensor]:
    """Return what a checkpoint's model is given of the images of the row with the most tokens that stand for some."""
    processor = Processor(checkpoint.folder, checkpoint.whole_config)
    _, part, row = max(
        (int(count), number, row)
        for number, part in enumerate(parts)
        for row, count in enumerate(part.counts_of_each(part.tokens == processor.image_id))
    )
    images = parts[part].images
    files = images.of_rows([row]) if images is not None else []
    return processor.pixels([blank_image(file.width, file.height) for file in files])
