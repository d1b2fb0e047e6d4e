"""The choice of a layout: the fastest that fits, or the missing memory and possible remedies."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

from shardprune.cluster.defaults import exchange_of
from shardprune.cluster.layout import Propagation, plan_layout
from shardprune.errors import InputError
from shardprune.planning.costs import Costs, Places
from shardprune.planning.hardware import HARDWARE, SPARE_HOST, Hardware
from shardprune.planning.memory import largest, node_bytes, peaks_of
from shardprune.planning.moments import Moment, Setup, total_bytes
from shardprune.planning.narrowing import planned_tasks
from shardprune.planning.recipe import PlanRecipe
from shardprune.planning.seconds import Expected, Phases
from shardprune.planning.workload import Model, Task
from shardprune.shard.device_room import device_room, memory_for
from shardprune.solvers.improving import LEAST_SAMPLES
from shardprune.solvers.methods import METHODS
from shardprune.storage.quantities import duration, gigabytes

MOST_CHUNKS = 16  # of a layer's experts that are tried: each is another pass over the layer


@dataclass(frozen=True)
class Candidate:
    """One way to run the tasks of a recipe, one after the other, on its machines. Sizes are bytes."""

    tasks: tuple[Task, ...]
    setup: Setup
    row: Hardware
    gpus: int

    @property
    def task(self) -> Task:
        """The task on the model that is given: the first of all."""
        return self.tasks[0]

    @property
    def runs(self) -> tuple[Costs, ...]:
        """The costs of the run of each task."""
        places = Places(self.setup.layout.replicas, self.gpus)
        return tuple(Costs(task, self.setup, self.row, places) for task in self.tasks)

    @property
    def costs(self) -> Costs:
        """The costs of the last run."""
        return self.runs[-1]

    @cached_property
    def seconds(self) -> Phases:
        *before, last = (Expected(costs).phases() for costs in self.runs)
        return replace(last, structure=sum(phases.total for phases in before))

    @cached_property
    def peaks(self) -> dict[str, Moment]:
        """The moment of largest memory of any worker by phase; that of a run before the last one as `structure`."""
        *before, last = (peaks_of(task, self.setup) for task in self.tasks)
        moments = [moment for phases in before for moment in phases.values()]
        worst = max(moments, key=total_bytes) if moments else None
        return ({"structure": replace(worst, phase="structure")} if worst else {}) | last

    @cached_property
    def worst(self) -> tuple[Moment, Moment]:
        """The moments of largest memory of a worker: on its device, and on its host."""
        devices, hosts = zip(*(largest(task, self.setup) for task in self.tasks), strict=True)
        return max(devices, key=lambda one: one.device.peak), max(hosts, key=lambda one: one.host.peak)

    @property
    def device_room(self) -> int:
        """Memory that a worker may use on its device."""
        return device_room(self.row.bytes)

    @property
    def node_room(self) -> int:
        """Memory that the workers of a node may use."""
        return int(self.row.host * self.gpus * (1 - SPARE_HOST))

    @cached_property
    def node(self) -> int:
        """Memory of the fullest node's workers."""
        workers = min(self.gpus, self.setup.layout.workers)
        return max(node_bytes(task, self.setup, workers) for task in self.tasks)

    @property
    def over(self) -> tuple[int, int]:
        """Missing memory of a GPU, and of a node."""
        device = self.worst[0].device.peak - self.device_room if self.setup.gpu else 0
        return max(0, device), max(0, self.node - self.node_room)

    @property
    def fits(self) -> bool:
        return self.over == (0, 0)

    @property
    def excess(self) -> tuple[float, float]:
        """Missing memory of a GPU, and of a node, as fractions of what they have."""
        device, node = self.over
        return device / self.row.bytes, node / (self.row.host * self.gpus)


def candidates(recipe: PlanRecipe, model: Model, propagation: Propagation) -> Iterator[Candidate]:
    """Yield all candidates that the recipe allows; none if parallel propagation has no second shard.

    Raises:
        InputError: the recipe fixes an impossible layout.
    """
    tasks, row = planned_tasks(recipe, model), recipe.row
    workers = recipe.nodes * recipe.gpus
    least, most = 1, min(model.layers, workers)
    if propagation == "parallel":
        least, most = (1, min(most, recipe.segments)) if recipe.segments else (2, most)
    sharing = recipe.samples - max(task.held_out for task in tasks)
    asked = (recipe.shards or 1) * (recipe.replicas or 1)
    if asked > workers:
        field = "shards" if recipe.shards else "replicas"
        raise InputError(field, f"{asked} workers need as many GPUs; the machines have {workers}")
    for count in [recipe.shards] if recipe.shards else _counts(least, most):
        for replicas in [recipe.replicas] if recipe.replicas else _counts(1, min(workers // count, sharing)):
            if count * replicas <= workers:
                yield from _held(recipe, model, propagation, tasks, row, count, replicas)


def _counts(least: int, most: int) -> list[int]:
    """Return the powers of two from `least` to `most`, and `most` itself."""
    return [count for count in sorted({*(2**power for power in range(most.bit_length())), most}) if least <= count]


def _held(
    recipe: PlanRecipe,
    model: Model,
    propagation: Propagation,
    tasks: tuple[Task, ...],
    row: Hardware,
    shards: int,
    replicas: int,
) -> Iterator[Candidate]:
    """Yield the candidates of one layout: weights resident or streamed, waves, and what a training needs between steps,
    on device or host."""
    segments = recipe.segments if propagation == "parallel" else None
    held_out = max(task.held_out for task in tasks)
    layout = plan_layout(model.layers, recipe.samples, propagation, shards, replicas, segments, held_out)
    joined = exchange_of(recipe.exchange, "ray", "cuda" if row.gpu else "cpu") == "group"
    for weights in ("resident", "streamed") if recipe.weights == "auto" else (recipe.weights,):
        places = ("device", "host") if recipe.activations == "auto" and row.gpu else (recipe.activations,)
        for place in places:
            on_host = place == "host" or not row.gpu
            setup = Setup(layout, weights == "streamed", on_host, row.gpu, joined and layout.workers > 1)
            # Waves leave the device before what a training needs does.
            trains = any(task.improving.reconstruction for task in tasks)
            leaves = trains and row.gpu and place == places[-1]
            for trains_on_host in (False, True) if leaves else (False,):
                chunked = _chunked(recipe, tasks, row, replace(setup, trains_on_host=trains_on_host))
                yield from chunked
                if chunked[-1].fits:
                    break


def _chunked(recipe: PlanRecipe, tasks: tuple[Task, ...], row: Hardware, setup: Setup) -> list[Candidate]:
    """Return the candidates with experts in more and more chunks, up to the first one that fits: more take longer."""
    found: list[Candidate] = []
    for chunks in [recipe.expert_chunks] if recipe.expert_chunks else _chunks(tasks[0]):
        found.append(Candidate(tasks, replace(setup, chunks=chunks), row, recipe.gpus))
        if found[-1].fits:
            break
    return found


def _chunks(task: Task) -> list[int]:
    """Return the numbers of chunks in which a layer's experts may be pruned."""
    experts = max(shape.experts for shape in task.model.shapes) if task.kind == "gram" else 0
    return _counts(1, min(experts, MOST_CHUNKS)) if experts > 1 else [1]


def choose(recipe: PlanRecipe, model: Model, propagation: Propagation) -> Candidate | None:
    """Return the fastest candidate that fits, else the one that lacks least; None if there is none.

    Raises:
        InputError: the recipe fixes an impossible layout.
    """
    found = list(candidates(recipe, model, propagation))
    fitting = [one for one in found if one.fits]
    if fitting:
        return min(fitting, key=lambda one: (round(one.seconds.total, 1), one.setup.layout.workers))
    return min(found, key=lambda one: max(one.excess)) if found else None


def unused(recipe: PlanRecipe, model: Model, propagation: Propagation, chosen: Candidate) -> str | None:
    """Return the reason why the chosen layout leaves GPUs without work; None where it uses all."""
    there, used = recipe.nodes * recipe.gpus, chosen.setup.layout.workers
    if used == there or (recipe.shards and recipe.replicas):
        return None
    more = [one for one in candidates(recipe, model, propagation) if one.setup.layout.workers > used]
    fitting = [one for one in more if one.fits]
    if not fitting:
        none = "no layout on more of them fits" if more else "these options allow no layout on more of them"
        return f"uses {used} of {there} GPUs: {none}"
    # The one that uses most; of several that do, the fastest.
    best = min(fitting, key=lambda one: (-one.setup.layout.workers, one.seconds.total))
    layout, parts = best.setup.layout, Expected(best.costs).parts()
    listed = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in parts.items())
    return (
        f"uses {used} of {there} GPUs: {len(layout.shards)} x {layout.replicas} (shards x replicas) would take"
        f" {duration(best.seconds.total)}, a layer {listed}"
    )


def second_shard(recipe: PlanRecipe, model: Model) -> str:
    """Return the reason why there is no candidate for parallel propagation."""
    if model.layers == 1:
        return "needs two shards, and the model has one layer"
    replicas = f" of {recipe.replicas} replicas each" if recipe.replicas else ""
    workers, there = 2 * (recipe.replicas or 1), recipe.nodes * recipe.gpus
    return f"needs two shards{replicas}, {workers} workers; the machines have {there}"


def missing(candidate: Candidate) -> str:
    """Describe how much memory the nearest candidate lacks, and where."""
    device, node = candidate.excess
    if device >= node:
        moment = candidate.worst[0]
        parts = {name: count for name, count in vars(moment.device).items() if count >= 10**8}
        listed = ", ".join(f"{name} {gigabytes(count)}" for name, count in parts.items())
        need, room, place = moment.device.peak, candidate.device_room, f"GPU of {gigabytes(candidate.row.bytes)}"
        return (
            f"{moment.phase}, {moment.step}: {gigabytes(need)} ({listed}), but a {place} has room for"
            f" {gigabytes(room)}; {gigabytes(need - room)} are missing"
        )
    need, room = candidate.node, candidate.node_room
    return (
        f"the workers of a node take {gigabytes(need)} of its memory, which has room for {gigabytes(room)};"
        f" {gigabytes(need - room)} are missing"
    )


def remedies(recipe: PlanRecipe, model: Model, propagation: Propagation, nearest: Candidate) -> list[str]:
    """Return single changes of a recipe with which it fits; if none is enough, the memory that the machines would
    need.
    """
    changes: dict[str, dict[str, object]] = {}
    if recipe.weights == "resident":
        changes["--weights streamed"] = {"weights": "streamed"}
    if recipe.activations == "device":
        changes["--activations host"] = {"activations": "host"}
    if recipe.shards or recipe.replicas:
        changes["a layout of its own choice (no --shards, no --replicas)"] = {"shards": None, "replicas": None}
    for nodes in (2, 4, 8, 16):
        changes[f"--nodes {nodes * recipe.nodes}"] = {"nodes": nodes * recipe.nodes}
    for part in (2, 4, 8):
        fewer = recipe.samples // part
        held_out = max(task.improving.held_out(fewer) for task in nearest.tasks)
        if fewer >= (LEAST_SAMPLES if held_out else 1) and fewer - held_out >= (recipe.replicas or 1):
            changes[f"--samples {fewer}"] = {"samples": fewer}
    if nearest.task.wave > 1:
        changes["--wave 1"] = {"wave": 1}
    zeroes = recipe.removal is None and recipe.zeroes
    factorises = zeroes and METHODS[recipe.method].needs == "gram"
    if zeroes and recipe.measure_error and not factorises:
        changes["--no-measure-error"] = {"measure_error": False}
    if factorises:
        changes["--method wanda --no-measure-error"] = {"method": "wanda", "measure_error": False}
    if model.narrower and nearest.task.kind == "gram":
        cheap = {"score": "amp", "correction": False, "measure_error": False}
        changes["--score amp --no-correction --no-measure-error"] = cheap
    helping: dict[str, str] = {}
    for label, change in changes.items():
        kind = label.split()[0]
        if kind not in helping:
            other = choose(recipe.model_copy(update=change), model, propagation)
            if other is not None and other.fits:
                helping[kind] = label
    return list(helping.values()) or [_larger_machines(recipe, nearest)]


def _larger_machines(recipe: PlanRecipe, nearest: Candidate) -> str:
    device, node = nearest.over
    needs = []
    if device:
        need = memory_for(nearest.worst[0].device.peak)
        names = [row.name for row in HARDWARE.values() if row.gpu and row.bytes >= need]
        known = f" ({', '.join(names)})" if names else ""
        needs.append(f"GPUs of {gigabytes(need)}{known}")
    if node:
        needs.append(f"nodes with {gigabytes(nearest.node / (1 - SPARE_HOST))} of memory")
    return " and ".join(needs)
