"""Wait until a cluster has so many free GPUs, then run a command in place of this process.

    python -m jobs.with_gpus 16 python -m jobs.prune RECIPE --out OUT

An autoscaler starts nodes for what waits, and a run takes the GPUs that there are when it starts.
"""

import os
import sys

import ray
from ray.util.placement_group import placement_group, remove_placement_group

from shardprune.errors import Stopped
from shardprune.signals import NAMES, handlers_kept, stoppable

POLL_SECONDS = 1.0  # for which Ray hears no signal
QUIET_POLLS = 60  # between two lines while it waits


def wait_for_gpus(count: int) -> None:
    """Return once the connected cluster has so many free GPUs."""
    group = placement_group([{"GPU": 1}] * count)
    polls = 0
    while not group.wait(POLL_SECONDS):
        if polls % QUIET_POLLS == 0:
            present = int(ray.cluster_resources().get("GPU", 0))
            print(f"waiting for {count} free GPUs; the cluster has {present}", flush=True)
        polls += 1
    remove_placement_group(group)


def main() -> None:
    count, *command = sys.argv[1:] or [""]
    if not count.isdecimal() or not int(count) or not command:
        sys.exit(_fail("gpus: give a number of at least 1 and a command: python -m jobs.with_gpus 16 COMMAND"))
    try:
        with stoppable():
            with handlers_kept():
                ray.init("auto", logging_level="ERROR", log_to_driver=False)
            wait_for_gpus(int(count))
            ray.shutdown()
    except ConnectionError:
        sys.exit(_fail("address: no Ray cluster is running here, and RAY_ADDRESS names none"))
    except Stopped as stop:
        sys.exit(_fail(f"stopped by {NAMES[stop.signal]} while waiting for GPUs", 128 + stop.signal))
    os.execvp(command[0], command)


def _fail(message: str, code: int = 2) -> int:
    print(f"error: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    main()
