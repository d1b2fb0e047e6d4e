"""Wait until a cluster has so many free GPUs, then run a command in place of this process.

    python -m jobs.with_gpus 16 python -m jobs.prune RECIPE --out OUT

An autoscaler starts nodes for what waits, and a run takes the GPUs that there are when it starts.
"""

import os
import shutil
import sys

from shardprune.errors import InputError, first_line
from shardprune.process import be
from shardprune.signals import handlers_kept

POLL_SECONDS = 1.0  # for which Ray hears no signal
QUIET_POLLS = 60  # between two lines while it waits
MOST = 10**5
USAGE = "give a number of at least 1 and a command: python -m jobs.with_gpus 16 COMMAND"


def wait_for_gpus(count: int) -> None:
    """Return once the cluster has so many free GPUs.

    Raises:
        InputError: there is no cluster.
    """
    import ray
    from ray.util.placement_group import placement_group, remove_placement_group

    try:
        with handlers_kept():
            ray.init("auto", logging_level="ERROR", log_to_driver=False)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise InputError("address", "no Ray cluster is running here, and RAY_ADDRESS names none") from error
    group = placement_group([{"GPU": 1}] * count)
    polls = 0
    while not group.wait(POLL_SECONDS):
        if polls % QUIET_POLLS == 0:
            present = int(ray.cluster_resources().get("GPU", 0))
            print(f"waiting for {count} free GPUs; the cluster has {present}", flush=True)
        polls += 1
    remove_placement_group(group)
    ray.shutdown()


def _carry_out() -> int:
    count, *command = sys.argv[1:] or [""]
    if not count.isdecimal() or len(count) > len(str(MOST)) or not 1 <= int(count) <= MOST or not command:
        raise InputError("gpus", USAGE)
    if not shutil.which(command[0]):
        raise InputError("command", f"{command[0]!r} is no program that can be found")
    wait_for_gpus(int(count))
    try:
        os.execvp(command[0], command)
    except OSError as error:
        raise InputError("command", f"{command[0]!r} cannot be started: {first_line(error)}") from error


def main() -> None:
    be(_carry_out)


if __name__ == "__main__":
    main()
