"""The layout of a run: the layers of each shard, and the segments that are pruned independently."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from shardprune.errors import InputError
from shardprune.shard.waves import split

Propagation = Literal["exact", "parallel"]


@dataclass(frozen=True)
class Layout:
    """Shards and segments of a model's layers, and replicas of each shard.

    `segments` are fixed when a run starts and shape its result; `shards` and `replicas` only place the work and may
    change when workers are lost. A single segment spans all shards; of several, each lies within one shard.
    """

    segments: tuple[range, ...]
    shards: tuple[Sequence[int], ...]
    replicas: int

    @property
    def workers(self) -> int:
        return len(self.shards) * self.replicas

    @property
    def stop(self) -> int:
        """The index after the last layer."""
        return self.shards[-1][-1] + 1

    def shard_of(self, layer: int) -> int:
        """Return the shard that owns a layer."""
        return next(index for index, shard in enumerate(self.shards) if layer in shard)

    def lanes(self) -> list[list[range]]:
        """Return the segments that each shard's workers prune in turn; lanes run in parallel."""
        if len(self.segments) == 1:
            return [list(self.segments)]
        return [[segment for segment in self.segments if segment.start in shard] for shard in self.shards]

    def shrunk_to(self, slots: int) -> "Layout":
        """Return the layout for at most `slots` workers: fewer replicas first, as a worker's memory holds its shard,
        then fewer shards."""
        if slots >= self.workers:
            return self
        shards = min(len(self.shards), slots)
        return Layout(self.segments, _shards(self.segments, shards), min(self.replicas, slots // shards))


def plan_layout(
    layers: int,
    samples: int,
    propagation: Propagation,
    shards: int,
    replicas: int,
    segments: int | None,
    held_out: int = 0,
) -> Layout:
    """Build the layout of a run.

    Args:
        shards, replicas: as asked for or chosen for the machine.
        segments: of the run that is resumed, as asked for, or None.
        held_out: of the samples, which add to no sums.

    Raises:
        InputError: there are more shards than layers or segments, or more replicas than samples that add to sums.
    """
    if shards > layers:
        raise InputError("shards", f"{shards} is more than the model's {layers} layers")
    if replicas > samples - held_out:
        kept = f"{samples - held_out} of {samples} samples that are not held out" if held_out else f"{samples} samples"
        raise InputError("replicas", f"{replicas} is more than the {kept}")
    if propagation == "exact":
        if segments not in (None, 1):
            raise InputError("segments", f"{segments} needs propagation parallel; exact propagation has one segment")
        count = 1
    else:
        count = segments or shards
        if count > layers:
            raise InputError("segments", f"{count} is more than the model's {layers} layers")
        if count < shards:
            raise InputError("segments", f"{count} is fewer than the {shards} shards; use at least one per shard")
    bounds = tuple(split(layers, count))
    return Layout(bounds, _shards(bounds, shards), replicas)


def _shards(segments: tuple[range, ...], count: int) -> tuple[range, ...]:
    """Divide into contiguous shards: of layers if there is one segment, else of whole segments."""
    if len(segments) == 1:
        return tuple(split(len(segments[0]), count))
    groups = [segments[part.start : part.stop] for part in split(len(segments), count)]
    return tuple(range(group[0].start, group[-1].stop) for group in groups)
