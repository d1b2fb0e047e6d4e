"""Everything that is decided before any work: inputs opened and checked, layout, fingerprint, output claimed."""

from dataclasses import dataclass
from functools import cache
from typing import Any

from torch import Tensor

from shardprune.cluster.defaults import device_of, dtype_of, threads_of
from shardprune.cluster.group import Backend, Slots, check_room
from shardprune.cluster.layout import Layout, plan_layout
from shardprune.cluster.object_store import store_bytes
from shardprune.cluster.pruning_job import Shares
from shardprune.commands.fingerprint import fingerprint_of
from shardprune.errors import InputError, without_credentials
from shardprune.model.checkpoint import Checkpoint, place_of
from shardprune.model.checks import check_seqlen, check_sparse, check_tensors
from shardprune.model.skeleton import Skeleton
from shardprune.model.structure.budget import narrowed_by
from shardprune.model.structure.shape import Widths, changes, reshaped, widths_of
from shardprune.planning.needs import needs
from shardprune.planning.workload import model_of, stored_dtype
from shardprune.recipes.identity import AnyRecipe, identifying_fields
from shardprune.recipes.mop import MopRecipe
from shardprune.recipes.prune import PruneRecipe, WidthRecipe
from shardprune.shard.spec import WorkerSpec
from shardprune.solvers.allocation.allocation import Projection, Share
from shardprune.solvers.allocation.allocations import ALLOCATIONS
from shardprune.solvers.allocation.budget import TOLERANCE
from shardprune.solvers.allocation.mixed import in_groups, nonzeros_in_all
from shardprune.solvers.outliers import Outliers
from shardprune.solvers.pattern import Mixed
from shardprune.solvers.scoring import Scoring
from shardprune.storage.folder import absolute, in_process_only
from shardprune.storage.journal import Journal, recorded_recipe
from shardprune.storage.retrying import preflight
from shardprune.storage.windows import calibration_windows, perplexity_windows


@dataclass(frozen=True)
class Base:
    """The model from which a first run has removed structures, where a second one zeroes weights of what remains.

    `weights` are those of its projections; `fingerprint` is the first run's.
    """

    model: str
    weights: int
    parameters: int
    fingerprint: str


@dataclass(frozen=True)
class Plan:
    """A run that can start. `recipe` has every choice made that the user left open; `widths` are those that its
    layers become, `base` what its model comes from, where either is."""

    recipe: AnyRecipe
    checkpoint: Checkpoint
    skeleton: Skeleton
    calibration: Tensor
    evaluations: dict[str, Tensor]
    layout: Layout
    journal: Journal
    state: dict[str, Any]
    widths: Widths | None = None
    base: Base | None = None

    @property
    def streamed(self) -> bool:
        return self.recipe.weights == "streamed"

    @property
    def wave(self) -> int:
        return self.recipe.sequences_per_wave

    @property
    def shapes(self) -> list[dict[str, tuple[int, int]]]:
        """[rows, cols] of every projection, by layer and name."""
        return [self.skeleton.projection_shapes(index) for index in range(self.skeleton.layers)]

    @property
    def weights(self) -> int:
        """The number of weights of all projections."""
        return sum(rows * cols for layer in self.shapes for rows, cols in layer.values())

    @property
    def removed(self) -> float:
        """The fraction of the base's weights that its model no longer has."""
        return 1 - self.weights / self.base.weights if self.base else 0.0

    @property
    def scoring(self) -> Scoring | None:
        """How the structures are chosen that go, if any are."""
        return self.recipe.scoring if isinstance(self.recipe, WidthRecipe | MopRecipe) else None

    @property
    def config_changes(self) -> dict[str, Any]:
        """Fields of the model's config that its output has otherwise."""
        return changes(self.skeleton.config, self.widths, range(self.skeleton.layers)) if self.widths else {}

    @property
    def parameters_after(self) -> int:
        """The number of parameters of the model that the run writes."""
        if self.widths is None:
            return self.skeleton.parameters()
        return Skeleton(reshaped(self.skeleton.config, self.widths), "cpu").parameters()

    def as_base(self) -> Base:
        """This run as the first of two."""
        return Base(self.recipe.model, self.weights, self.skeleton.parameters(), self.journal.fingerprint)

    def facts(self) -> dict[str, Any]:
        """What the events of a run begin with."""
        return {
            "command": self.recipe.command,
            "fingerprint": self.journal.fingerprint,
            "layers": self.skeleton.layers,
        }

    def record(self) -> dict[str, Any]:
        """The recipe for files that others read."""
        return self.recipe.record() | ({"model": without_credentials(self.base.model)} if self.base else {})

    def shares(self, outliers: list[Outliers]) -> Shares:
        """What every projection gives up; empty where a sparse checkpoint says it.

        Args:
            outliers: by layer, where the allocation looks at them.
        """
        recipe = self.recipe
        if not isinstance(recipe, PruneRecipe):
            return {}
        projections = [
            Projection(index, name, rows * cols)
            for index, layer in enumerate(self.shapes)
            for name, (rows, cols) in layer.items()
        ]
        allocation, target = ALLOCATIONS[recipe.allocation], recipe.zeroed(self.removed)
        sparsities = allocation.allocate(projections, outliers, target, recipe.outlier_lambda)
        if isinstance(recipe.zeros, Mixed):
            sparsities = in_groups(sparsities, target, recipe.zeros.m)
        spent = sum(sparsities[projection.layer, projection.name] * projection.weights for projection in projections)
        mean = spent / sum(projection.weights for projection in projections)
        assert not allocation.exact or abs(mean - target) <= TOLERANCE, f"{recipe.allocation} allocates {mean}"
        ratios = {(layer, name): ratio for layer, of in enumerate(outliers) for name, ratio in of.projections.items()}
        return {key: Share(sparsity, ratios.get(key)) for key, sparsity in sparsities.items()}

    def worker_specs(self, layout: Layout, finished: set[int]) -> list[WorkerSpec]:
        """What each worker of a layout must know."""
        recipe = self.recipe
        assert recipe.threads is not None
        model = model_of(self.skeleton, recipe.model, stored_dtype(self.checkpoint))
        windows = max(map(len, self.evaluations.values()), default=0)
        need = needs(recipe, model, layout, self.skeleton.dtype.itemsize, windows)
        return [
            WorkerSpec(
                model=recipe.model,
                out=recipe.out,
                fingerprint=self.journal.fingerprint,
                shard=shard,
                replica=replica,
                layers=layers,
                method=recipe.solver,
                pattern=recipe.pattern,
                sparse=recipe.sparse,
                rebuilding=recipe.rebuilding,
                scoring=self.scoring,
                widths=self.widths,
                measure_error=recipe.measure_error,
                weights=recipe.weights,
                activations=recipe.activations,
                activation_bytes=self._activation_bytes(layout),
                device=recipe.device,
                dtype=str(self.skeleton.dtype).removeprefix("torch."),
                threads=recipe.threads,
                finished=frozenset(finished),
                need=need[shard],
            )
            for shard, layers in enumerate(layout.shards)
            for replica in range(layout.replicas)
        ]

    def store_bytes(self) -> int:
        """Memory for what is under way between workers: waves, the sums that replicas exchange, solved projections."""
        recipe, layout, family, itemsize = self.recipe, self.layout, self.skeleton.family, self.skeleton.dtype.itemsize
        wave = self.wave * recipe.seqlen * self.skeleton.config.hidden_size * itemsize
        sizes = {name: rows * cols for name, (rows, cols) in self.shapes[0].items()}
        weights, sent = sum(sizes.values()) * itemsize, 0
        if isinstance(recipe, MopRecipe):  # layers that move to another shard, or are narrowed on another replica
            sent = 2 * layout.replicas * weights
        elif layout.replicas > 1:
            blocks = [sum(sizes[name] for name in names) for names in family.blocks.values()]
            gradients = (layout.replicas - 1) * 4 * max(blocks) if recipe.rebuilding else 0
            sent = weights + gradients
        return store_bytes(layout, wave, (self.shapes[0][names[0]][1] for names in family.inputs), sent)

    def _activation_bytes(self, layout: Layout) -> int:
        """What a worker keeps of the calibration waves: its share of the samples, once for each of its segments."""
        replicas, held = layout.replicas, max(len(lane) for lane in layout.lanes())
        if isinstance(self.recipe, MopRecipe):  # half of the replicas have them all, and what they are compared with
            replicas, held = max(1, replicas // 2), 1 + (self.recipe.scored_by != "perplexity")
        samples = -(-len(self.calibration) // replicas)
        return held * samples * self.recipe.seqlen * self.skeleton.config.hidden_size * self.skeleton.dtype.itemsize


@preflight()
def prepare(recipe: AnyRecipe, backend: Backend, base: Base | None = None, claimed: str | None = None) -> Plan:
    """Open and check everything that a recipe names, and decide what it leaves open.

    Args:
        base: what the recipe's model comes from, where this is the second run of two.
        claimed: the output of the second run, where this is the first: it may hold what was decided earlier.

    Raises:
        InputError: something cannot work; nothing has been written then.
    """
    for field, url in (("model", recipe.model), ("sparse", recipe.sparse), ("out", recipe.out)):
        if url and in_process_only(url) and recipe.backend != "local":
            raise InputError(field, f"{url!r} lives in this process's memory; use backend local")
    checkpoint = Checkpoint(place_of(recipe.model))
    slots = backend.slots()
    recipe = recipe.model_copy(update={"device": device_of(recipe, slots)})
    # Where structures go, all that is cut passes through memory: biases and norms, too.
    whole = isinstance(recipe, WidthRecipe | MopRecipe)
    skeleton = Skeleton(checkpoint.config, "cpu", dtype_of(recipe, checkpoint, whole))
    check_tensors(skeleton, checkpoint)
    check_seqlen(recipe.seqlen, skeleton)
    _check_layout(recipe, skeleton.layers)
    _check_mixed(recipe, skeleton)
    widths = _widths(recipe, skeleton)
    sparse = Checkpoint(place_of(recipe.sparse), "sparse") if recipe.sparse else None
    if sparse:
        check_sparse(skeleton, sparse, checkpoint, recipe.pattern)

    tokenizer = cache(checkpoint.tokenizer)
    vocabulary = skeleton.config.vocab_size
    calibration = calibration_windows(
        recipe.calibration, tokenizer, recipe.samples, recipe.seqlen, recipe.seed, vocabulary
    )
    evaluations = {
        without_credentials(source): perplexity_windows(
            source, tokenizer, recipe.seqlen, vocabulary, recipe.eval_windows
        )
        for source in recipe.eval
    }

    asked = (recipe.shards or 1) * (recipe.replicas or 1)
    recipe, layout = _decide(recipe, slots, skeleton.layers, claimed)
    identity = base.fingerprint if base else checkpoint.identity()
    fingerprint = fingerprint_of(recipe, layout, skeleton.dtype, identity, sparse, calibration)
    journal = Journal(recipe.out, fingerprint, skeleton.layers, checkpoint.stored_name)
    state = journal.check(recipe.resume) or {}
    # What was started goes on with the workers that there are.
    check_room(backend, 1 if state else asked, recipe.device)
    layout = layout.shrunk_to(int(min(backend.room(recipe.device), layout.workers)))
    return Plan(recipe, checkpoint, skeleton, calibration, evaluations, layout, journal, state, widths, base)


def _decide(recipe: AnyRecipe, slots: Slots, layers: int, claimed: str | None) -> tuple[AnyRecipe, Layout]:
    """Choose shards, replicas and threads where the recipe leaves them open.

    What shapes the result to the bit (segments, threads) stays as an earlier attempt recorded it.
    """
    recipe = recipe.model_copy(
        update={
            "model": place_of(recipe.model),
            "out": absolute(recipe.out),
            "wave": recipe.sequences_per_wave,
            **({"sparse": place_of(recipe.sparse)} if recipe.sparse else {}),
        }
    )
    recorded = _recorded(recipe, recipe.out) or (_recorded(recipe, claimed) if claimed else {})
    asked = type(recipe).model_fields
    parallel = recipe.propagation == "parallel"
    segments = recipe.segments or (recorded.get("segments") if parallel else None)
    workers = slots.workers(recipe.device)
    shards = recipe.shards or 1
    if parallel and not recipe.shards:
        shards = max(1, min(layers, segments or layers, workers // (recipe.replicas or 1)))
    spare = slots.gpus // shards if recipe.device == "cuda" and not parallel else 1
    replicas = recipe.replicas or max(1, min(spare, recipe.samples))
    if parallel and recipe.shards and segments and not recipe.segments:
        shards = min(shards, segments)  # goes on with the segments of its start
    layout = plan_layout(layers, recipe.samples, recipe.propagation, shards, replicas, segments)
    threads = recipe.threads or recorded.get("threads") or threads_of(slots, layout.workers)
    chosen = {
        "shards": shards,
        "replicas": replicas,
        "segments": len(layout.segments) if parallel else None,
        "threads": threads,
    }
    return recipe.model_copy(update={name: chosen[name] for name in chosen if name in asked}), layout


def _recorded(recipe: AnyRecipe, out: str) -> dict[str, Any]:
    """What an output holds of the same recipe, cut off earlier; empty where it holds none or another one."""
    if not recipe.resume:
        return {}
    recorded = recorded_recipe(out)
    asked = recipe.record()
    same = all(recorded.get(name) == asked[name] for name in identifying_fields(type(recipe)))
    return recorded if same else {}


def _check_layout(recipe: AnyRecipe, layers: int) -> None:
    """Check what the recipe asks for before anything is read that takes time."""
    shards = recipe.shards or 1
    replicas = recipe.replicas or 1
    plan_layout(layers, recipe.samples, recipe.propagation, shards, replicas, recipe.segments)


def _widths(recipe: AnyRecipe, skeleton: Skeleton) -> Widths | None:
    """The widths that structured pruning leaves every layer.

    Raises:
        InputError: the model cannot give so much.
    """
    if not isinstance(recipe, WidthRecipe):
        return None
    assert recipe.structured is not None
    try:
        shapes = skeleton.projection_shapes(0)
        widths = narrowed_by(skeleton.config, shapes, recipe.structured, recipe.neuron_multiple)
    except ValueError as error:
        raise InputError("structured", f"{recipe.structured} is more than the model can give: {error}") from error
    if widths == widths_of(skeleton.config):
        raise InputError("structured", f"{recipe.structured} is less than half a neuron of a layer; nothing would go")
    return widths


def _check_mixed(recipe: AnyRecipe, skeleton: Skeleton) -> None:
    """Check that N of M can have the recipe's sparsity as their mean over the layers, in whole groups."""
    if isinstance(recipe, PruneRecipe) and isinstance(recipe.zeros, Mixed):
        for name, (_, cols) in skeleton.projection_shapes(0).items():
            if cols % recipe.zeros.m:
                raise InputError("pattern", f"{recipe.pattern} does not fit {name}, which has {cols} inputs")
        try:
            nonzeros_in_all(recipe.target, skeleton.layers, recipe.zeros.m)
        except ValueError as error:
            raise InputError(
                "sparsity", f"{recipe.target} does not fit the pattern {recipe.pattern}: {error}"
            ) from error
