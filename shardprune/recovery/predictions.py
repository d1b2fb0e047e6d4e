"""Batches of rows as a model's arguments and the places where it predicts, made ahead of their use."""

from collections.abc import Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from shardprune.recovery.rows import IGNORED, Rows


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
    def of(cls, rows: Rows, chosen: Sequence[int], mask: bool) -> "PredictionBatch":
        """Collate rows; `mask` as in `Rows.collate`."""
        inputs = rows.collate(chosen, mask)
        following = nn.functional.pad(inputs.pop("labels")[:, 1:], (0, 1), value=IGNORED).flatten()
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
    rows: Rows, batches: Iterable[Sequence[int]], mask: bool, device: torch.device
) -> Generator[PredictionBatch, None, None]:
    """Yield batches of rows on a device; a thread makes each while the one before it is in use."""

    def make(chosen: Sequence[int]) -> PredictionBatch:
        batch = PredictionBatch.of(rows, chosen, mask)
        return batch.pinned() if device.type == "cuda" else batch

    with ThreadPoolExecutor(1) as thread:
        upcoming: Future[PredictionBatch] | None = None
        for chosen in batches:
            due, upcoming = upcoming, thread.submit(make, chosen)
            if due is not None:
                yield due.result().to(device)
        if upcoming is not None:
            yield upcoming.result().to(device)
