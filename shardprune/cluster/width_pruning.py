"""Width pruning of a layer: its inputs are summed over all waves, one replica chooses and cuts, all take the result."""

from typing import Any

from shardprune.cluster.group import Ref
from shardprune.cluster.layer_in_work import LayerInWork
from shardprune.model.structure.shape import Widths
from shardprune.shard.forward_worker import ForwardWorker
from shardprune.shard.narrowed_layers import NarrowedLayers
from shardprune.storage.records import KeptStructures


def narrow_layer(layer: LayerInWork, inputs: tuple[str, ...], widths: Widths, passed_on: bool) -> KeptStructures:
    """Make a layer narrower on every replica, beside the layer as it was; return the structures that it keeps.

    Args:
        inputs: the layer's inputs, by the first projection that reads each.
        passed_on: replace every wave by its image under the layer as it was.
    """
    layer.over_waves(ForwardWorker.accumulate, passed_on)
    kept, rest = cut_layer(layer, inputs, widths)
    layer.wait(rest)
    return layer.group.get(kept)


def cut_layer(
    layer: LayerInWork, inputs: tuple[str, ...], widths: Widths
) -> tuple[Ref[KeptStructures], list[Ref[Any]]]:
    """Make a layer narrower whose inputs are summed up; return references to the structures that it keeps, and to the
    other calls to wait for."""
    refs: list[Ref[Any]] = [*layer.reduce(dict.fromkeys(inputs, layer.turn))]
    kept = layer.ask(layer.turn, NarrowedLayers.narrow, widths)
    if others := layer.others(layer.turn):
        choice = layer.ask(layer.turn, NarrowedLayers.choice)
        refs += [layer.ask(replica, NarrowedLayers.install_narrowed, widths, choice) for replica in others]
    return kept, refs
