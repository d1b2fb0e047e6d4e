"""Slots that nobody will use again: those of placement groups whose creators are dead.

Ray frees them at the end of the job. Ray Train's own cleaner asks the dashboard, which a cluster may lack, and misses a
controller that ends while its workers are launched: the attempt after a lost worker would wait for its own slots.
"""

import logging
from functools import cache

import ray
from ray.util.placement_group import PlacementGroup, remove_placement_group

from shardprune.errors import first_line

_logger = logging.getLogger(__name__)


def free_leftovers() -> None:
    """Remove the placement groups that dead actors of this job created: what they are to hold has no owner any more.

    Ray's public calls do not say who created a group. Where a Ray has its own state elsewhere, a warning says, once,
    that slots may stay taken.
    """
    try:
        left = _left()
    except Exception as error:  # of any kind: names and types of another Ray
        _warn(f"{type(error).__name__}: {first_line(error)}")
        return
    for group in left:
        remove_placement_group(PlacementGroup(ray.PlacementGroupID(group)))


@cache
def _warn(reason: str) -> None:
    """Warn once of a reason."""
    _logger.warning("slots that a lost training held may stay taken until the job ends: %s", reason)


def _left() -> list[bytes]:
    """Return the placement groups of this job whose creators are dead actors."""
    from ray._private import state
    from ray.core.generated.gcs_pb2 import PlacementGroupTableData

    job = ray.get_runtime_context().get_job_id()
    told = state.state._connect_and_get_accessor().get_placement_group_table()
    groups = [PlacementGroupTableData.FromString(one) for one in told]
    return [
        group.placement_group_id
        for group in groups
        if not ray.ActorID(group.creator_actor_id).is_nil()  # of a driver the next says that the actor is dead, too
        and group.creator_actor_dead
        and group.state != PlacementGroupTableData.REMOVED
        and group.creator_job_id.hex() == job
    ]
