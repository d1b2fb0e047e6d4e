"""Training the kept weights of a solved layer towards the dense layer's output, by one replica."""

from dataclasses import replace
from functools import partial

from shardprune.cluster.group import Ref, flow
from shardprune.cluster.held_out import HeldOut
from shardprune.cluster.layer_in_work import LayerInWork
from shardprune.cluster.passes import in_flight
from shardprune.cluster.pending_work import PendingWork
from shardprune.shard.forward_worker import ForwardWorker, dense_stream
from shardprune.shard.improving_worker import ImprovingWorker
from shardprune.shard.reconstruction import Place, lent_stream
from shardprune.solvers.training import windows_of_steps
from shardprune.storage.records import LayerRecord

STEP = "reconstruction"


def reconstruct_layer(work: PendingWork, layer: LayerInWork, record: LayerRecord, held_out: HeldOut) -> LayerRecord:
    """Train a layer, if that makes it better; return its record with what is new.

    The output errors of its projections are no longer known then: they are those of the layer that matter.

    Args:
        record: of the solved or narrowed layer.
    """
    names, steps = work.family.kinds[layer.layer].projections, work.improving.reconstruction
    held_out.measure()
    zeros = held_out.improve(STEP, names, partial(train, layer, names, steps, held_out.norm))
    layer.step.advance()
    if zeros is None:
        return record
    reports = [replace(report, zeros=zeros[report.name], error=None) for report in record.projections]
    kept = record.kept and replace(record.kept, errors={})
    return replace(record, projections=tuple(reports), kept=kept)


def train(layer: LayerInWork, names: tuple[str, ...], steps: int, norm: float) -> dict[str, int]:
    """Train linear maps of a layer on the replica whose turn it is, and give the result to every replica; return the
    zeros of each.

    Which windows a step sees, and in which order, depends on the layer alone.

    Args:
        names: of the maps.
        norm: ||dense output - dense input||^2 of a window.
    """
    waves = layer.waves.calibrating.all
    windows = [(wave, row) for wave in waves for row in range(wave.stop - wave.start)]
    drawn = list(windows_of_steps(len(windows), layer.waves.tokens.shape[1], steps, layer.layer))
    seen = {window for batch in drawn for window in batch}
    places: dict[int, Place] = {}
    lent: dict[int, list[int]] = {}  # rows of other replicas' waves
    for window in sorted(seen):
        wave, row = windows[window]
        if wave.replica == layer.turn:
            places[window] = layer.stream, wave.index, row
        else:
            rows = lent.setdefault(wave.index, [])
            places[window] = lent_stream(layer.stream), wave.index, len(rows)
            rows.append(row)
    _lend(layer, lent)
    batches = [[places[window] for window in batch] for batch in drawn]
    zeros = layer.ask(layer.turn, ImprovingWorker.reconstruct, batches, norm, names)
    layer.wait(layer.share(names, layer.turn))
    lending = lent_stream(layer.stream)
    for stream in (lending, dense_stream(lending)) if lent else ():
        layer.group.get(layer.group.submit(layer.shard, layer.turn, ForwardWorker.drop, stream))
    return layer.group.get(zeros)


def _lend(layer: LayerInWork, lent: dict[int, list[int]]) -> None:
    """Bring rows of other replicas' waves to the one whose turn the layer is."""
    group, shard = layer.group, layer.shard
    replicas = {wave.index: wave.replica for wave in layer.waves.all}

    def move(stream: str, wave: int) -> Ref[None]:
        hidden = group.submit(shard, replicas[wave], ImprovingWorker.lend, stream, wave, tuple(lent[wave]))
        return group.submit(shard, layer.turn, ForwardWorker.put, kept[stream], wave, hidden)

    lending = lent_stream(layer.stream)
    kept = {layer.stream: lending, dense_stream(layer.stream): dense_stream(lending)}
    for _ in flow(group, (move(stream, wave) for stream in kept for wave in lent), in_flight(layer.layout)):
        pass
