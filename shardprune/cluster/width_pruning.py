"""Making a layer narrower: its inputs summed up over all waves, one replica chooses and cuts, all take the result."""

from typing import Any

from shardprune.cluster.group import Ref
from shardprune.cluster.layer_in_work import LayerInWork
from shardprune.model.structure.shape import Widths
from shardprune.shard.width_worker import WidthWorker


def narrow_layer(layer: LayerInWork, widths: Widths, passed_on: bool) -> dict[str, Any]:
    """Make a layer narrower on every replica; it has not yet taken the place of the layer as it was.

    Args:
        passed_on: replace every wave by its image under the layer as it was.

    Returns the report of what stays.
    """
    for _ in layer.over_waves(WidthWorker.gather, passed_on):
        pass
    reports = [layer.group.get(ref) for ref in cut_layer(layer, widths)]
    return reports[0]


def cut_layer(layer: LayerInWork, widths: Widths) -> list[Ref[Any]]:
    """Choose and cut where the inputs of a layer are summed up; references to wait for, the report's first."""
    asked = layer.layer % layer.layout.replicas
    refs: list[Ref[Any]] = [layer.ask(asked, WidthWorker.narrow, widths, *layer.from_others(asked, WidthWorker.sums))]
    others = [replica for replica in range(layer.layout.replicas) if replica != asked]
    if others:
        choice = layer.ask(asked, WidthWorker.choice)
        refs += [layer.ask(replica, WidthWorker.install_narrowed, widths, choice) for replica in others]
    return refs
