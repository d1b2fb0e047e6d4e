"""The observing pass: dense waves through all shards before anything is pruned.

It keeps the inputs of the segments of parallel propagation, and computes every layer's outlier ratios on the layer's
shard. Only the ratios travel to the driver.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from shardprune.cluster.group import Group, Ref, flow
from shardprune.cluster.layer_in_work import LayerInWork
from shardprune.cluster.layout import Layout
from shardprune.cluster.passes import Waves, account, in_flight, layer_by_layer, pipeline, release, to_all
from shardprune.report.progress import Step
from shardprune.shard.forward_worker import ForwardWorker
from shardprune.solvers.outliers import Outliers


@dataclass(frozen=True)
class Observation:
    """The subject of an observing pass: the first layers of segments whose inputs are kept, and the M of the outlier
    ratios (None: no ratios)."""

    firsts: tuple[int, ...]
    outlier_m: float | None

    def __bool__(self) -> bool:
        return bool(self.firsts) or self.outlier_m is not None

    def stop(self, layout: Layout) -> int:
        """Return the layer before which the waves may end."""
        return layout.stop if self.outlier_m is not None else max(self.firsts)

    def parts(self, layout: Layout, waves: Waves, streamed: bool) -> int:
        """Return the number of parts that `observe` reports to its progress step."""
        return len(waves.all) * (self.stop(layout) if streamed else 1)


def observe(
    group: Group,
    layout: Layout,
    waves: Waves,
    observation: Observation,
    inputs: Sequence[Sequence[str]],
    streamed: bool,
    step: Step,
) -> list[Outliers]:
    """Send the dense calibration waves through; return the outlier ratios by layer where they are asked for.

    Args:
        inputs: of each layer, by the first projection that reads each.
    """
    stop = observation.stop(layout)
    last = layout.shard_of(min(stop, layout.stop - 1))
    ratios = observation.outlier_m is not None
    merging: list[Ref[None]] = []
    refs: list[Ref[Outliers]] = []
    stream = "observation"

    def ask(index: int) -> None:
        if ratios:
            layer = LayerInWork(group, layout, waves, stream, index, step)
            merging.extend(layer.reduce(dict.fromkeys(inputs[index], layer.turn)))
            refs.append(layer.ask(layer.turn, ForwardWorker.outliers, observation.outlier_m))

    if streamed:
        layers = layer_by_layer(group, layout, waves, stream, "dense", observation.firsts, stop, step, ratios)
        for layer in layers:
            ask(layer)  # while it is still in memory
        to_all(group, layout, last, ForwardWorker.drop, stream)
    else:
        arrived = pipeline(group, layout, waves, "dense", observation.firsts, stop, ratios)
        discarded = (
            group.submit(last, wave.replica, ForwardWorker.discard, hidden)
            for wave, hidden in zip(waves.in_turn(), arrived, strict=True)
        )
        for _ in flow(group, discarded, in_flight(layout)):
            step.advance()
        for layer in range(stop):
            ask(layer)
    for merged in merging:
        group.get(merged)
    outliers = [group.get(ref) for ref in refs]
    release(group, layout)
    account(group, layout, range(len(layout.shards)), step.record)
    return outliers
