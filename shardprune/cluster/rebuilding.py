"""Rebuilding the masks of a solved layer: first its attention, then its MLP, which sees the attention rebuilt."""

from typing import Any

from shardprune.cluster.group import Group
from shardprune.cluster.layout import Layout
from shardprune.cluster.passes import Waves, to_waves
from shardprune.cluster.replicas import from_others, to_others
from shardprune.cluster.work import Work
from shardprune.progress import Step

REBUILDER = 0  # the replica that swaps


def rebuild_layer(
    group: Group,
    layout: Layout,
    waves: Waves,
    work: Work,
    stream: str,
    shard: int,
    layer: int,
    solvers: list[int],
    reports: dict[str, dict[str, Any]],
    step: Step,
) -> list[dict[str, Any]]:
    """Rebuild the masks of both blocks on every replica.

    The projections' `reports` by name get their zeros as they are then and, where errors are measured, their
    output errors from the replicas that solved them. Returns for each block its swapped pairs and its output
    error before and after.
    """
    settings = work.rebuilding
    assert settings is not None
    blocks: list[dict[str, Any]] = []
    for label, names in zip(("attention", "mlp"), work.family.blocks, strict=True):
        report: dict[str, Any] = {"layer": layer, "block": label}
        if settings.needs_gradients or work.measure_error:
            report["error_before"] = _compare(
                group, layout, waves, stream, shard, layer, names, settings.needs_gradients, step
            )
        parts = []
        if settings.needs_gradients:
            parts = from_others(group, layout, shard, REBUILDER, "gradients", layer, names)
        shares = work.shares_of(layer, names)
        rebuilt = group.submit(shard, REBUILDER, "rebuild", layer, names, shares, *parts)
        report["swaps"], zeros = group.get(rebuilt)
        for name in names:
            reports[name] |= {"zeros": zeros[name], "achieved": zeros[name] / reports[name]["weights"]}
        for ref in to_others(group, layout, shard, REBUILDER, layer, names):
            group.get(ref)
        if work.measure_error:
            report["error_after"] = _compare(group, layout, waves, stream, shard, layer, names, False, step)
            measuring = [
                group.submit(shard, solver, "measure", layer, inputs, names)
                for inputs, solver in enumerate(solvers)
                if work.family.inputs[inputs][0] in names
            ]
            for ref in measuring:
                for name, error in group.get(ref).items():
                    reports[name]["error"] = error
        blocks.append(report)
    return blocks


def _compare(
    group: Group,
    layout: Layout,
    waves: Waves,
    stream: str,
    shard: int,
    layer: int,
    names: tuple[str, ...],
    gradients: bool,
    step: Step,
) -> float:
    """The relative output error of a block over all waves, ||dense - sparse||^2 / ||dense||^2."""
    pairs = {}
    compared = to_waves(group, layout, waves, shard, "compare", stream, layer, names, gradients)
    for wave, pair in zip(waves.in_turn(), compared, strict=True):
        pairs[wave.index] = pair
        step.advance()
    lost, norm = (sum(pairs[index][place] for index in sorted(pairs)) for place in (0, 1))
    return lost / norm if norm > 0 else 0.0
