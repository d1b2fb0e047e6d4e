"""The widths that a removal of structures leaves every layer of a model."""

from shardprune.errors import InputError
from shardprune.model.families import structures_of
from shardprune.model.pruning_job import WidthRemoval
from shardprune.model.skeleton import Skeleton
from shardprune.model.structure.alignment import narrowed_by
from shardprune.model.structure.shape import Widths, widths_of


def widths_left(removal: WidthRemoval, skeleton: Skeleton) -> Widths:
    """Return the widths of every layer without the structures that go.

    Raises:
        InputError: the model cannot give so much, its heads and neurons are not known, or nothing would go.
    """
    structures_of(skeleton.config.model_type, "structured")
    try:
        shapes = skeleton.projection_shapes(0)
        multiple, parallel = removal.neuron_multiple, removal.tensor_parallel
        widths = narrowed_by(skeleton.config, shapes, removal.share, multiple, parallel)
    except InputError:
        raise
    except ValueError as error:
        raise InputError("structured", f"{removal.share} is more than the model can give: {error}") from error
    if widths == widths_of(skeleton.config):
        raise InputError(
            "structured", f"{removal.share} is less than half of what goes together in a layer; nothing would go"
        )
    return widths
