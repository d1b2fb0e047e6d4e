"""What happens when workers die: a new attempt on what is left, which goes on where the last one was."""

from collections.abc import Callable
from typing import Protocol, TypeVar

from shardprune.cluster.group import Backend
from shardprune.errors import WorkerLost, first_line
from shardprune.recipes.groups import BackendFields
from shardprune.report.progress import Reporter

P = TypeVar("P", bound="Placement")


class Placement(Protocol):
    """How work is laid out over workers."""

    def shrunk_to(self: P, slots: int) -> P:
        """The same for at most `slots` workers."""


def persevere(
    attempt: Callable[[P], None],
    planned: P,
    workers: BackendFields,
    backend: Backend,
    reporter: Reporter,
    lost: Callable[[], None],
) -> None:
    """Call `attempt` with a placement until it succeeds; after workers were lost, with one for those that are left.

    Args:
        lost: called whenever workers were lost.

    Raises:
        WorkerLost: that happened more than `max_restarts` times, or none is left.
    """
    placement, losses = planned, 0
    while True:
        try:
            attempt(placement)
            return
        except WorkerLost as error:
            losses += 1
            reporter.events.emit("lost", reason=first_line(error))
            lost()
            if losses > workers.max_restarts:
                raise
            reporter.say(f"a worker was lost ({error}); going on with what is left")
            left = backend.settle().workers(workers.device)
            if not left:
                raise
            placement = planned.shrunk_to(left)
