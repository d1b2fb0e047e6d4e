"""What makes two runs the same."""

import hashlib
import json

import torch
from torch import Tensor

from shardprune.cluster.layout import Layout
from shardprune.model.checkpoint import Checkpoint
from shardprune.recipes.identity import AnyRecipe, shaping_fields
from shardprune.recipes.mop import MopRecipe
from shardprune.storage.windows import tokens_hash

FORMAT = 3  # of what a fingerprint covers; changes when the same recipe gives other tensors


def fingerprint_of(
    recipe: AnyRecipe,
    layout: Layout,
    dtype: torch.dtype,
    identity: str,
    sparse: Checkpoint | None,
    calibration: Tensor,
) -> str:
    """A hash of everything that shapes the tensors, and nothing else: the same run on other workers is the same run.

    Args:
        identity: of the model, or of the run that makes it.
    """
    content = {
        "format": FORMAT,
        "model": identity,
        "tokens": tokens_hash(calibration),
        "seqlen": recipe.seqlen,
        "wave": recipe.sequences_per_wave,
        "dtype": str(dtype),
        "segments": [segment.start for segment in layout.segments],
        **recipe.model_dump(include=shaping_fields(recipe)),
    }
    if recipe.target is not None:
        content["sparsity"] = recipe.target  # which a pattern may have fixed
    if isinstance(recipe, MopRecipe) and recipe.criterion == "random":
        content["seed"] = recipe.seed  # which draws the path
    if sparse:
        content["sparse"] = sparse.identity()
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
