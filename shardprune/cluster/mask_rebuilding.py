"""Rebuilding the masks of a solved layer: first its attention, then its MLP, which sees the attention rebuilt."""

from dataclasses import dataclass
from typing import Any

from shardprune.cluster.layer_in_work import LayerInWork
from shardprune.cluster.pruning_job import Work
from shardprune.shard.prune_worker import PruneWorker

REBUILDER = 0  # the replica that swaps


@dataclass(frozen=True)
class Rebuilt:
    """A layer after its masks were rebuilt: a report of each block (pairs swapped, output error before and
    after), and by name what is new in the reports of the projections (zeros and, where measured, error)."""

    blocks: list[dict[str, Any]]
    projections: dict[str, dict[str, Any]]


def rebuild_layer(work: Work, layer: LayerInWork, solvers: list[int]) -> Rebuilt:
    """Rebuild the masks of both blocks on every replica.

    Args:
        solvers: the replica that solved each input and holds its statistics.
    """
    settings = work.rebuilding
    assert settings is not None
    rebuilt = Rebuilt([], {})
    for label, names in work.family.blocks.items():
        report: dict[str, Any] = {"layer": layer.layer, "block": label}
        if settings.needs_gradients or work.measure_error:
            report["error_before"] = _compare(layer, names, settings.needs_gradients)
        parts = layer.from_others(REBUILDER, PruneWorker.gradients, names) if settings.needs_gradients else []
        shares = work.shares_of(layer.layer, names)
        report["swaps"], zeros = layer.group.get(layer.ask(REBUILDER, PruneWorker.rebuild, names, shares, *parts))
        rebuilt.projections.update({name: {"zeros": count} for name, count in zeros.items()})
        for ref in layer.share(names, REBUILDER):
            layer.group.get(ref)
        if work.measure_error:
            report["error_after"] = _compare(layer, names, False)
            for name, error in _measure(work, layer, names, solvers).items():
                rebuilt.projections[name]["error"] = error
        rebuilt.blocks.append(report)
    return rebuilt


def _compare(layer: LayerInWork, names: tuple[str, ...], gradients: bool) -> float:
    """The relative output error of a block over all waves, ||dense - sparse||^2 / ||dense||^2."""
    pairs = dict(layer.over_waves(PruneWorker.compare, names, gradients))
    lost, norm = (sum(pairs[index][place] for index in sorted(pairs)) for place in (0, 1))
    return lost / norm if norm > 0 else 0.0


def _measure(work: Work, layer: LayerInWork, names: tuple[str, ...], solvers: list[int]) -> dict[str, float]:
    """The output errors of a block's projections, each from the replica that solved it."""
    measuring = [
        layer.ask(solver, PruneWorker.measure, inputs, names)
        for inputs, solver in enumerate(solvers)
        if work.family.inputs[inputs][0] in names
    ]
    return {name: error for ref in measuring for name, error in layer.group.get(ref).items()}
