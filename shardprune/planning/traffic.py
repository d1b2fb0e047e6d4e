"""Bytes that a run brings over the network, and reads and writes where models lie."""

from dataclasses import dataclass

from shardprune.planning.simulation import SimulatedGroup


@dataclass(frozen=True)
class Traffic:
    """Bytes `between_workers` through Ray's object store, those of them `between_nodes` (a node fetches a result once,
    whoever of its workers asks for it), and bytes `read` and `written` of models."""

    between_workers: int
    between_nodes: int
    read: int
    written: int


def traffic_of(group: SimulatedGroup) -> Traffic:
    """What the driver's calls of a simulated run amount to."""
    task = group.task
    written = task.model.parameters * task.stored
    return Traffic(group.between_workers, group.between_nodes, group.read * task.stored, written)
