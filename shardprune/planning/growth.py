"""Scaling of a run's simulated time with nodes, samples and bandwidth."""

from dataclasses import dataclass

from pydantic import ByteSize

from shardprune.cluster.layout import Propagation
from shardprune.planning.chart import idle_share
from shardprune.planning.choosing import choose
from shardprune.planning.recipe import PlanRecipe
from shardprune.planning.simulation import SimulatedGroup, simulate
from shardprune.planning.workload import Model
from shardprune.solvers.improving import LEAST_SAMPLES

WORKERS = 1024  # largest variation


@dataclass(frozen=True)
class Growth:
    """The run with one change: its best layout, the simulated `seconds`, and the `idle` share."""

    changed: str
    shards: int
    replicas: int
    seconds: float
    idle: float


def growth(recipe: PlanRecipe, model: Model, propagation: Propagation) -> list[Growth]:
    """Simulate the run as it is, and with more or fewer machines, samples and bandwidth."""
    rows: list[Growth] = []
    known: dict[tuple, SimulatedGroup] = {}  # cache: more machines often give the same layout
    for label, varied in _variations(recipe):
        best = choose(varied, model, propagation)
        if best is None or not best.fits:
            continue
        setup, layout = best.setup, best.setup.layout
        key = (varied.samples, varied.network, layout, setup.streamed, setup.waves_on_host, setup.trains_on_host)
        if key not in known:
            known[key] = simulate(*best.runs)
        group = known[key]
        rows.append(Growth(label, len(layout.shards), layout.replicas, group.seconds, idle_share(group)))
    return rows


def _variations(recipe: PlanRecipe) -> list[tuple[str, PlanRecipe]]:
    wanted = sorted({max(1, recipe.nodes // 2), *(factor * recipe.nodes for factor in (1, 2, 4, 8))})
    nodes = [count for count in wanted if count != recipe.nodes and count * recipe.gpus <= WORKERS]
    rate = int(recipe.row.network)
    varied = [("as it is", recipe)]
    varied += [(f"{count} node{'s' * (count > 1)}", recipe.model_copy(update={"nodes": count})) for count in nodes]
    least = LEAST_SAMPLES if recipe.improving or recipe.router_kd else 1  # of which some are held out
    for factor in (0.5, 2):
        samples = int(recipe.samples * factor)
        if samples >= max(least, recipe.replicas or 1):
            varied.append((f"{samples} samples", recipe.model_copy(update={"samples": samples})))
    for factor in (0.1, 10):
        network = ByteSize(rate * factor)
        varied.append((f"{rate * factor / 1e9:g} GB/s network", recipe.model_copy(update={"network": network})))
    return varied
