"""The plan of a run: layout, memory, traffic and seconds for each propagation, and whether it fits."""

from dataclasses import asdict, dataclass
from typing import Any

from shardprune.cluster.layout import Propagation
from shardprune.model.structure.shape import widths_of
from shardprune.planning.chart import idle_share, rows_of
from shardprune.planning.choosing import Candidate, choose, missing, remedies, unused
from shardprune.planning.growth import Growth, growth
from shardprune.planning.narrowing import read_planned
from shardprune.planning.recipe import PlanRecipe
from shardprune.planning.simulation import SimulatedGroup, simulate
from shardprune.planning.traffic import Traffic, traffic_of
from shardprune.planning.workload import Model, with_fewer_experts
from shardprune.planning.writing import Writing, writing_of
from shardprune.recipes.fitting import fitted
from shardprune.storage.retrying import preflight

PROPAGATIONS: tuple[Propagation, ...] = ("exact", "parallel")


@dataclass(frozen=True)
class Planned:
    """The plan for one propagation: the layout, `missing` and `helps` if it does not fit, why GPUs are `unused` if some
    are, the `writing` of calibration text if the model writes any, and the simulated growth if asked for.
    """

    propagation: Propagation
    candidate: Candidate
    traffic: Traffic
    group: SimulatedGroup
    missing: str | None
    helps: list[str]
    unused: str | None
    growth: list[Growth]
    writing: Writing | None = None

    @property
    def fits(self) -> bool:
        return self.candidate.fits and (self.writing is None or self.writing.fits)

    @property
    def options(self) -> dict[str, Any]:
        """The options of `shardprune prune`, or of `experts`, that select the planned run."""
        setup = self.candidate.setup
        layout = setup.layout
        options: dict[str, Any] = {} if self.candidate.task.model.fewer else {"propagation": self.propagation}
        options |= {"shards": len(layout.shards), "replicas": layout.replicas}
        if len(layout.segments) not in (1, len(layout.shards)):
            options["segments"] = len(layout.segments)
        options["weights"] = "streamed" if setup.streamed else "resident"
        if setup.gpu:
            options["activations"] = "host" if setup.waves_on_host else "device"
        if setup.chunks > 1:
            options["expert-chunks"] = setup.chunks
        return options

    def as_json(self, simulated: bool) -> dict[str, Any]:
        one, setup = self.candidate, self.candidate.setup
        shards = [[shard[0], shard[-1]] for shard in setup.layout.shards]
        phases = {
            phase: {
                "step": moment.step,
                "device": {**asdict(moment.device), "peak": moment.device.peak},
                "host": {**asdict(moment.host), "peak": moment.host.peak},
            }
            for phase, moment in one.peaks.items()
        }
        content: dict[str, Any] = {
            "propagation": self.propagation,
            "fits": self.fits,
            "missing": self.missing,
            "helps": self.helps,
            "unused": self.unused,
            "layout": {
                "shards": len(setup.layout.shards),
                "replicas": setup.layout.replicas,
                "segments": len(setup.layout.segments),
                "layers": shards,
                "weights": "streamed" if setup.streamed else "resident",
                "activations": "host" if setup.waves_on_host else "device",
                "moments": "host" if setup.trains_on_host else "device",
                "expert_chunks": setup.chunks,
            },
            "memory": {
                "device_room": one.device_room if setup.gpu else None,
                "node_room": one.node_room,
                "node": one.node,
                "phases": phases,
            },
            "bytes": asdict(self.traffic),
            "seconds": {**asdict(one.seconds), "total": one.seconds.total},
        }
        if self.writing:
            writing = self.writing
            content["writing"] = {
                "sequences": writing.sequences,
                "batch": writing.batch,
                "shards": len(writing.layout.shards),
                "replicas": writing.layout.replicas,
                "resident": writing.room.resident,
                "weights": writing.held,
                "keys_and_values": writing.room.batch_bytes,
                "batches": writing.room.batches,
                "smaller_batch": writing.smaller,
                "seconds": writing.seconds,
            }
        if simulated:
            content["simulation"] = {
                "seconds": {**self.group.phases, "total": self.group.seconds},
                "idle": idle_share(self.group),
                "workers": rows_of(self.group),
                "growth": [asdict(row) for row in self.growth],
            }
        return content


@dataclass(frozen=True)
class PlanResult:
    """The result of `shardprune plan`."""

    recipe: PlanRecipe
    model: Model
    plans: list[Planned]
    simulated: bool

    @property
    def fits(self) -> bool:
        """Whether the run fits with any of the planned propagations."""
        return any(plan.fits for plan in self.plans)

    def as_json(self) -> dict[str, Any]:
        model, row = self.model, self.recipe.row
        left = {"parameters_after": model.left.parameters} if model.left else {}
        if model.narrower:
            widths = widths_of(model.narrower.skeleton.config)
            left |= {"groups_after": widths.groups, "neurons_after": widths.neurons}
        return {
            "version": 1,
            "recipe": self.recipe.record(),
            "model": {
                "parameters": model.parameters,
                "layers": model.layers,
                "stored": str(model.stored).removeprefix("torch."),
                "bytes_per_weight_in_files": model.in_files,
                **left,
            },
            "machines": {"nodes": self.recipe.nodes, "gpus": self.recipe.gpus, "attained": vars(row)},
            "plans": [plan.as_json(self.simulated) for plan in self.plans],
        }


@preflight()
def plan(recipe: PlanRecipe, simulated: bool = False) -> PlanResult:
    """Plan a run; no weight is read.

    Args:
        simulated: include the growth of the simulated time.

    Raises:
        InputError: the model cannot be read, a field of the recipe does not go with it, or the recipe asks for an
            impossible layout, or for experts or structures that the model cannot give.
    """
    model = with_fewer_experts(read_planned(recipe), recipe)
    recipe = fitted(recipe, model.skeleton)
    asked = PROPAGATIONS if recipe.propagation == "both" else (recipe.propagation,)
    if model.fewer:  # layers are copied behind one pass over the dense model
        asked = ("exact",)
    plans = []
    for propagation in asked:
        candidate = choose(recipe, model, propagation)
        if candidate is None:  # parallel propagation without a second shard
            continue
        group = simulate(*candidate.runs)
        writing = writing_of(recipe, candidate)
        short = None if candidate.fits else missing(candidate)
        helps = remedies(recipe, model, propagation, candidate) if short else []
        if short is None and writing and not writing.fits:
            short, helps = writing.missing, ["a smaller --self-batch", "more shards", "--calibration self:OUT"]
        grown = growth(recipe, model, propagation) if simulated and candidate.fits else []
        idle = None if short else unused(recipe, model, propagation, candidate)
        plans.append(Planned(propagation, candidate, traffic_of(group), group, short, helps, idle, grown, writing))
    return PlanResult(recipe, model, plans, simulated)
