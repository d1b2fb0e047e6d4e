"""Making a layer narrower: its inputs summed up over all waves, one replica chooses and cuts, all take the result."""

from typing import Any

from shardprune.cluster.layer import LayerInWork
from shardprune.structure.shape import Widths


def narrow_layer(layer: LayerInWork, widths: Widths) -> dict[str, Any]:
    """Make a layer narrower on every replica; it has not yet taken the place of the layer as it was.

    Returns the report of what stays.
    """
    for _ in layer.over_waves("gather"):
        pass
    asked = layer.layer % layer.layout.replicas
    narrowing = layer.ask(asked, "narrow", widths, *layer.from_others(asked, "sums"))
    others = [replica for replica in range(layer.layout.replicas) if replica != asked]
    if others:
        parameters = layer.ask(asked, "narrowed")
        for ref in [layer.ask(replica, "install_narrowed", widths, parameters) for replica in others]:
            layer.group.get(ref)
    return layer.group.get(narrowing)
