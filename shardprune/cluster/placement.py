"""Placement of a run: where it works and in which units, with no choice left open."""

from dataclasses import dataclass
from typing import Any, Literal

import torch

from shardprune.cluster.defaults import threads_of
from shardprune.cluster.group import Slots
from shardprune.cluster.layout import Layout, Propagation, plan_layout
from shardprune.model.checkpoint import place_of
from shardprune.model.skeleton import Skeleton
from shardprune.recipes.identity import LayerRecipe, identifying_fields
from shardprune.storage.folder import absolute
from shardprune.storage.journal import recorded_recipe


@dataclass(frozen=True)
class Placement:
    """A run's workers, the units of its work, and its model and output as every process finds them.

    `layout` and `threads` (of a worker), `dtype` (of the computation) and `wave` (sequences) shape the result to the
    bit; attempts after a loss use the layout shrunk.
    """

    layout: Layout
    propagation: Propagation
    threads: int
    device: str
    dtype: torch.dtype
    streamed: bool
    activations: Literal["auto", "device", "host"]
    wave: int
    model: str
    out: str

    @property
    def weights(self) -> Literal["resident", "streamed"]:
        """How a worker holds its layers, in a recipe's words."""
        return "streamed" if self.streamed else "resident"

    @property
    def dtype_name(self) -> str:
        """The dtype in torch's words, for other processes."""
        return str(self.dtype).removeprefix("torch.")

    def choices(self) -> dict[str, Any]:
        """Return the fields of a recipe that are decided."""
        return {
            "model": self.model,
            "out": self.out,
            "device": self.device,
            "threads": self.threads,
            "wave": self.wave,
            "shards": len(self.layout.shards),
            "replicas": self.layout.replicas,
            "segments": len(self.layout.segments) if self.propagation == "parallel" else None,
        }


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
    recorded = _recorded(recipe, decided, out) or (_recorded(recipe, decided, claimed) if claimed else {})
    parallel = asked.propagation == "parallel"
    segments = asked.segments or (recorded.get("segments") if parallel else None)
    shards = asked.shards or 1
    if parallel and not asked.shards:
        fitting = slots.workers(device) // (asked.replicas or 1)
        shards = max(1, min(skeleton.layers, segments or skeleton.layers, fitting))
    spare = slots.gpus // shards if device == "cuda" and not parallel else 1
    replicas = asked.replicas or max(1, min(spare, recipe.samples))
    if parallel and asked.shards and segments and not asked.segments:
        shards = min(shards, segments)  # goes on with the segments of its start
    layout = plan_layout(skeleton.layers, recipe.samples, asked.propagation, shards, replicas, segments)
    return Placement(
        layout=layout,
        propagation=asked.propagation,
        threads=recipe.threads or recorded.get("threads") or threads_of(slots, layout.workers),
        device=device,
        dtype=skeleton.dtype,
        streamed=asked.streamed,
        activations=recipe.activations,
        wave=recipe.sequences_per_wave,
        model=model,
        out=out,
    )


def _recorded(recipe: LayerRecipe, decided: dict[str, Any], out: str) -> dict[str, Any]:
    """Return the recipe that an output holds of the same run, cut off earlier; nothing of another one."""
    if not recipe.resume:
        return {}
    recorded, sparse = recorded_recipe(out), recipe.job().sparse
    asked = recipe.model_copy(update={**decided, **({"sparse": place_of(sparse)} if sparse else {})}).record()
    same = all(recorded.get(name) == asked[name] for name in identifying_fields(type(recipe)))
    return recorded if same else {}
