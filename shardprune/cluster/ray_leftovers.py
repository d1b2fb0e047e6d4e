"""Slots that nobody will use again: those of placement groups whose creators are dead.

Ray frees them at the end of the job. Ray Train's own cleaner asks the dashboard, which a cluster may lack, and misses a
controller that ends while its workers are launched: the attempt after a lost worker would wait for its own slots.
"""

import ray
from ray._private import state
from ray.core.generated.gcs_pb2 import PlacementGroupTableData
from ray.util.placement_group import PlacementGroup, remove_placement_group


def free_leftovers() -> None:
    """Remove the placement groups that dead actors of this job created: what they are to hold has no owner any more."""
    job = ray.get_runtime_context().get_job_id()
    for told in state.state._connect_and_get_accessor().get_placement_group_table():
        group = PlacementGroupTableData.FromString(told)
        of_actor = not ray.ActorID(group.creator_actor_id).is_nil()  # of a driver this says that the actor is dead, too
        left = of_actor and group.creator_actor_dead and group.state != PlacementGroupTableData.REMOVED
        if left and group.creator_job_id.hex() == job:
            remove_placement_group(PlacementGroup(ray.PlacementGroupID(group.placement_group_id)))
