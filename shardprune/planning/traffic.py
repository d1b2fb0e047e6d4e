"""Bytes of a run over the network, and bytes read and written of models."""

from dataclasses import dataclass

from shardprune.planning.simulation import SimulatedGroup


@dataclass(frozen=True)
class Traffic:
    """Bytes of a run.

    Attributes:
        between_workers: through Ray's object store.
        between_nodes: those of them that cross nodes; a node fetches a result once for all its workers.
        read, written: of models.
    """

    between_workers: int
    between_nodes: int
    read: int
    written: int


def traffic_of(group: SimulatedGroup) -> Traffic:
    """Return the traffic of a simulated run."""
    return Traffic(group.between_workers, group.between_nodes, int(group.read), int(group.written))
