"""Text that a model writes on its shards: waves of sequences grow token by token, one wave behind the other.

As many waves grow at the same time as there are shards, so that each shard has one in work. A token that the last
shard draws goes to the first one, without the driver, which only bounds what is under way.

Where layers are streamed, each token takes a reading of the whole model: then a wave has as many batches as workers
have room for.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from shardprune.cluster.group import Group, Ref, flow
from shardprune.cluster.layout import Layout
from shardprune.cluster.passes import account, to_all
from shardprune.errors import InputError
from shardprune.model.draft import Draft
from shardprune.report.progress import Step
from shardprune.shard.generation_worker import GenerationWorker, Room
from shardprune.shard.waves import Wave, split
from shardprune.storage.quantities import gigabytes


def layout_of_writing(layout: Layout, streamed: bool, batches: int) -> Layout:
    """Return the layout in which the workers of a run write text.

    Where the run streams its layers, all of its workers are shards, because more of the layers stay in memory then. A
    replica without a batch is left out.
    """
    shards, replicas = len(layout.shards), layout.replicas
    layers = range(layout.stop)
    if streamed:
        shards, replicas = min(len(layers), layout.workers), 1
    return Layout((layers,), tuple(split(len(layers), shards)), min(replicas, batches))


def parts_of_writing(draft: Draft, written: int) -> int:
    """Return the number of parts that writing the sequences after the first `written` ones reports to its step."""
    return sum(1 for batch in draft.batches if batch.start >= written) * (draft.length - 1)


def write(group: Group, layout: Layout, draft: Draft, written: int, step: Step) -> Iterator[Tensor]:
    """Write sequences; yield their tokens [sequences, seqlen], round after round, in order.

    Args:
        written: sequences that are written already, in whole batches.

    Raises:
        InputError: a worker has no room for what layers keep of one batch.
        SolverError: the model's logits are not finite.
    """
    room = _room(group, layout)
    left = [batch for batch in draft.batches if batch.start >= written]
    waves = 0
    for batches in rounds_of(left, layout, room):
        growing = [Wave(waves + place, *wave) for place, wave in enumerate(batches)]
        waves += len(growing)
        yield _round(group, layout, draft, growing, step)
        account(group, layout, range(len(layout.shards)), step.record)


def _room(group: Group, layout: Layout) -> Room:
    """Return the room of the worker that has the least."""
    rooms = [
        room for shard in range(len(layout.shards)) for room in to_all(group, layout, shard, GenerationWorker.room)
    ]
    least = min(rooms, key=lambda room: (room.resident, room.batches))
    if not least.batches:
        raise InputError(
            "self_batch",
            f"the keys, values and states of a batch of sequences take {gigabytes(least.batch_bytes)} of a worker, "
            f"which has {gigabytes(least.bytes)} for them and its layers; "
            "use a smaller batch, more shards, or self:OUT",
        )
    return Room(least.resident, min(room.batches for room in rooms), least.batch_bytes, least.bytes)


def rounds_of(batches: list[range], layout: Layout, room: Room) -> Iterator[list[tuple[int, int, int]]]:
    """Yield the waves that grow together as (replica, start, stop)."""
    side_by_side = min(len(layout.shards), room.batches) * layout.replicas
    most = 1 if room.resident else room.batches * layout.replicas // side_by_side  # batches of a wave
    done = 0
    while done < len(batches):
        left = len(batches) - done
        size = min(most, -(-left // side_by_side))
        waves = [batches[at : at + size] for at in range(done, min(done + size * side_by_side, len(batches)), size)]
        yield [(place % layout.replicas, wave[0].start, wave[-1].stop) for place, wave in enumerate(waves)]
        done += sum(map(len, waves))


def _round(group: Group, layout: Layout, draft: Draft, waves: list[Wave], step: Step) -> Tensor:
    """Write the sequences of some waves from the first token to the last; return the tokens that count."""
    last = len(layout.shards) - 1
    openings = {wave.index: draft.openings(range(wave.start, wave.stop)) for wave in waves}
    tokens: dict[int, list[Tensor]] = {index: [*opening.split(1, 1)] for index, opening in openings.items()}
    latest: dict[int, Ref[Tensor]] = {}
    under_way: list[Wave] = []

    def drawn() -> Iterator[Ref[Tensor]]:
        for position in range(draft.length - 1):
            for wave in waves:
                given = openings[wave.index]
                incoming: Any = given[:, position : position + 1] if position < given.shape[1] else latest[wave.index]
                for shard in range(last):
                    incoming = group.submit(shard, wave.replica, GenerationWorker.extend, wave, position, incoming)
                latest[wave.index] = group.submit(last, wave.replica, GenerationWorker.draw, wave, position, incoming)
                under_way.append(wave)
                yield latest[wave.index]

    for place, drawn_now in enumerate(flow(group, drawn(), 2 * len(waves))):
        wave = under_way[place]
        if place // len(waves) + 1 >= openings[wave.index].shape[1]:  # else the next token is given
            tokens[wave.index].append(drawn_now)
        step.advance(len([batch for batch in draft.batches if wave.start <= batch.start < wave.stop]))
    for wave in waves:
        for shard in range(last + 1):
            group.get(group.submit(shard, wave.replica, GenerationWorker.forget, wave))
    return torch.cat([torch.cat(tokens[wave.index], 1)[:, draft.dropped :] for wave in waves])
