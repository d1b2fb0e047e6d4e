"""Batches of rows as a model's arguments and the places where it predicts, made ahead of their use."""

from collections.abc import Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from shardprune.model.checkpoint import Checkpoint
from shardprune.model.processor import Processor
from shardprune.recovery.packed_attention import BOUNDS, bounds_of
from shardprune.recovery.rows import IGNORED, Rows, needs_mask
from shardprune.storage.images import read_image


@dataclass(frozen=True)
class Reading:
    """How a model is given rows.

    Attributes:
        mask: as in `Rows.collate`.
        bounds: whether it is told where examples begin, for rows are packed; see `bounds_of`.
        processor: makes of images what the model is given of them; None where it sees none.
    """

    mask: bool
    bounds: bool = False
    processor: Processor | None = None

    @classmethod
    def of(cls, checkpoint: Checkpoint, *rows: Rows | None) -> "Reading":
        """Return how a checkpoint's model is given rows.

        Raises:
            InputError: its processor is gone.
        """
        mask, seeing = needs_mask(checkpoint.config.model_type), shows_images(*rows)
        packed = any(part is not None and part.packed for part in rows)
        processor = Processor(checkpoint.folder, checkpoint.whole_config) if seeing else None
        return cls(mask, packed and not mask, processor)


def shows_images(*rows: Rows | None) -> bool:
    """Return whether any of the rows show images."""
    return any(part is not None and part.images is not None for part in rows)


@dataclass(frozen=True, eq=False)
class PredictionBatch:
    """A batch of rows.

    Attributes:
        inputs: keyword arguments of the model's forward pass on rows [batch, length], see `Rows.collate`.
        places: int64 [predictions], of the tokens whose successors are predicted, in the flattened batch.
        targets: int64 [predictions], the tokens that follow.
    """

    inputs: dict[str, Tensor]
    places: Tensor
    targets: Tensor

    @classmethod
    def of(cls, rows: Rows, chosen: Sequence[int], reading: "Reading") -> "PredictionBatch":
        """Collate rows, and read the images that they show."""
        inputs = rows.collate(chosen, reading.mask)
        if reading.bounds:
            inputs[BOUNDS] = bounds_of(inputs["position_ids"])
        following = nn.functional.pad(inputs.pop("labels")[:, 1:], (0, 1), value=IGNORED).flatten()
        if reading.processor is not None:
            files = rows.images.of_rows(chosen) if rows.images is not None else []
            inputs = reading.processor.completed(inputs, [read_image(file.url, "data") for file in files])
        places = (following != IGNORED).nonzero()[:, 0]
        return cls(inputs, places, following[places])

    def pinned(self) -> "PredictionBatch":
        """Return the same in pinned memory, from which a GPU copies while the host goes on."""
        inputs = {name: tensor.pin_memory() for name, tensor in self.inputs.items()}
        return PredictionBatch(inputs, self.places.pin_memory(), self.targets.pin_memory())

    def to(self, device: torch.device) -> "PredictionBatch":
        """Return the same on a device; a copy from pinned memory is queued behind the device's work."""
        inputs = {name: tensor.to(device, non_blocking=True) for name, tensor in self.inputs.items()}
        return PredictionBatch(
            inputs, self.places.to(device, non_blocking=True), self.targets.to(device, non_blocking=True)
        )


def ahead(
    rows: Rows, batches: Iterable[Sequence[int]], reading: Reading, device: torch.device
) -> Generator[PredictionBatch, None, None]:
    """Yield batches of rows on a device; a thread makes each while the one before it is in use."""

    def make(chosen: Sequence[int]) -> PredictionBatch:
        batch = PredictionBatch.of(rows, chosen, reading)
        return batch.pinned() if device.type == "cuda" else batch

    with ThreadPoolExecutor(1) as thread:
        upcoming: Future[PredictionBatch] | None = None
        for chosen in batches:
            due, upcoming = upcoming, thread.submit(make, chosen)
            if due is not None:
                yield due.result().to(device)
        if upcoming is not None:
            yield upcoming.result().to(device)
