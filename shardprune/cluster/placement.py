"""Placement of a run: where it works and in which units, with no choice left open."""

from dataclasses import dataclass
from typing import Annotated, Any

import torch
from pydantic import BaseModel, Field

from shardprune.cluster.defaults import exchange_of, threads_of
from shardprune.cluster.group import Slots
from shardprune.cluster.layout import Layout, Propagation, plan_layout
from shardprune.model.checkpoint import place_of
from shardprune.model.skeleton import Skeleton
from shardprune.recipes.groups import WorkerFields
from shardprune.recipes.identity import identifying_fields
from shardprune.recipes.layer_recipe import LayerRecipe
from shardprune.shard.spec import WorkerSettings
from shardprune.storage.journal import recorded_recipe
from shardprune.storage.json_file import fitting
from shardprune.storage.locations import absolute
from shardprune.storage.malformed import located


@dataclass(frozen=True)
class Placement:
    """A run's workers, the units of its work, and its output as every process finds it.

    `layout`, `wave` (sequences) and the workers' dtype and threads shape the result to the bit; attempts after a loss
    use the layout shrunk.
    """

    layout: Layout
    propagation: Propagation
    workers: WorkerSettings
    wave: int
    out: str

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the computation."""
        return self.workers.compute_dtype

    def choices(self) -> dict[str, Any]:
        """Return the fields of a recipe that are decided."""
        return {
            "model": self.workers.model,
            "out": self.out,
            "device": self.workers.device,
            "threads": self.workers.threads,
            "exchange": self.workers.exchange,
            "wave": self.wave,
            "shards": len(self.layout.shards),
            "replicas": self.layout.replicas,
            "segments": len(self.layout.segments) if self.propagation == "parallel" else None,
        }


def worker_settings(fields: WorkerFields, model: str, device: str, dtype: torch.dtype, threads: int) -> WorkerSettings:
    """Return the settings of a run's workers: the recipe's, with the choices that it leaves open."""
    return WorkerSettings(
        model=model,
        device=device,
        dtype=str(dtype).removeprefix("torch."),
        threads=threads,
        streamed=fields.asked.streamed,
        activations=fields.activations,
        exchange=exchange_of(fields.exchange, fields.backend, device),
    )


def place_run(
    recipe: LayerRecipe, slots: Slots, device: str, skeleton: Skeleton, claimed: str | None = None
) -> Placement:
    """Choose shards, replicas and threads where a recipe leaves them open.

    What shapes the result to the bit (segments, threads) stays as an earlier attempt recorded it.

    Args:
        claimed: another output that may hold what was decided earlier.

    Raises:
        InputError: the layout that is asked for does not fit the model.
    """
    model, out, asked = place_of(recipe.model), absolute(recipe.out), recipe.asked
    decided = {"model": model, "out": out, "wave": recipe.sequences_per_wave, "device": device}
    decided |= recipe.decided
    recorded = _recorded(recipe, decided, out)
    if claimed and recorded == _Recorded():
        recorded = _recorded(recipe, decided, claimed)
    parallel = asked.propagation == "parallel"
    segments = asked.segments or (recorded.segments if parallel else None)
    shards = asked.shards or 1
    if parallel and not asked.shards:
        fitting = slots.workers(device) // (asked.replicas or 1)
        shards = max(1, min(skeleton.layers, segments or skeleton.layers, fitting))
    spare = slots.gpus // shards if device == "cuda" and not parallel else 1
    held_out = recipe.job().improving.held_out(recipe.samples)
    replicas = asked.replicas or max(1, min(spare, recipe.samples - held_out))
    if parallel and asked.shards and segments and not asked.segments:
        shards = min(shards, segments)  # goes on with the segments of its start
    layout = plan_layout(skeleton.layers, recipe.samples, asked.propagation, shards, replicas, segments, held_out)
    # Another number of threads adds in another order: a run keeps the one that it began with.
    threads = recorded.threads or recipe.threads or threads_of(slots, layout.workers)
    workers = worker_settings(recipe, model, device, skeleton.dtype, threads)
    return Placement(layout, asked.propagation, workers, recipe.sequences_per_wave, out)


class _Recorded(BaseModel):
    """The choices of an earlier attempt that shape the result to the bit."""

    threads: Annotated[int, Field(ge=1)] | None = None
    segments: Annotated[int, Field(ge=1)] | None = None


def _recorded(recipe: LayerRecipe, decided: dict[str, Any], out: str) -> _Recorded:
    """Return what an output holds of the same run, cut off earlier; nothing of another one."""
    if not recipe.resume:
        return _Recorded()
    recorded, sparse = recorded_recipe(out), recipe.job().sparse
    asked = recipe.model_copy(update={**decided, **({"sparse": place_of(sparse)} if sparse else {})}).record()
    same = all(_name(recorded.get(name)) == _name(asked[name]) for name in identifying_fields(type(recipe)))
    if not same:
        return _Recorded()
    with located("out", f"the recipe that {out} holds"):
        return fitting(recorded, _Recorded)


def _name(value: Any) -> Any:
    """Return a recipe's value, of a path its last part, of several those of all: the output may have been moved, and
    its fingerprint says whose it is."""
    if isinstance(value, list | tuple):
        return [_name(item) for item in value]
    return value.rstrip("/").rpartition("/")[2] if isinstance(value, str) else value
