"""The run fingerprint: a hash of everything that changes the output tensors."""

import hashlib

from shardprune.cluster.placement import Placement
from shardprune.commands.calibration import CalibrationText
from shardprune.model.checkpoint import Checkpoint
from shardprune.recipes.layer_recipe import LayerRecipe
from shardprune.solvers.allocation.allocation import Sparsities
from shardprune.storage.json_file import dump_json

FORMAT = 4  # of what a fingerprint covers; changes when the same recipe gives other tensors


def fingerprint_of(
    recipe: LayerRecipe,
    placement: Placement,
    identity: str,
    sparse: Checkpoint | None,
    text: CalibrationText,
    given: Sparsities | None = None,
    statistics: str | None = None,
) -> str:
    """Return a hash of everything that shapes the tensors, and nothing else: on other workers a run is the same run.

    Args:
        identity: of the model, or of the run that makes it.
        given: the sparsities of an allocation file.
        statistics: hash of statistics of experts that are given.
    """
    content = {
        "format": FORMAT,
        "model": identity,
        **text.identity(),
        "seqlen": recipe.seqlen,
        "wave": placement.wave,
        "dtype": str(placement.dtype),
        "segments": [segment.start for segment in placement.layout.segments],
        **recipe.shape(),
    }
    if given:
        content["allocation_file"] = [[*place, given[place]] for place in sorted(given)]
    if statistics:
        content["statistics"] = statistics
    if sparse:
        content["sparse"] = sparse.identity()
    return hashlib.sha256(dump_json(content, sort_keys=True).encode()).hexdigest()
