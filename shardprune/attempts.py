"""What happens when workers die: a new attempt on what is left, which goes on where the last one was."""

from collections.abc import Callable

from shardprune.cluster.group import Backend
from shardprune.cluster.layout import Layout
from shardprune.errors import WorkerLost
from shardprune.progress import Output
from shardprune.setting_groups import Workers


def persevere(
    attempt: Callable[[Layout], None],
    layout: Layout,
    workers: Workers,
    backend: Backend,
    output: Output,
    lost: Callable[[], None],
) -> None:
    """Call `attempt` with a layout until it succeeds; after workers were lost, with one for those that are left.

    Args:
        lost: called whenever workers were lost.

    Raises:
        WorkerLost: that happened more than `max_restarts` times, or none is left.
    """
    planned, losses = layout, 0
    while True:
        try:
            attempt(layout)
            return
        except WorkerLost as error:
            losses += 1
            lost()
            if losses > workers.max_restarts:
                raise
            output.say(f"a worker was lost ({error}); going on with what is left")
            left = backend.settle().workers(workers.device)
            if not left:
                raise
            layout = planned.shrunk_to(left)
