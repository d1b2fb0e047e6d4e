"""Wait until a cluster has so many free GPUs, then run a command in place of this process.

    python -m jobs.with_gpus 16 python -m jobs.prune RECIPE --out OUT

An autoscaler starts nodes for what waits, and a run takes the GPUs that there are when it starts.
"""

import os
import sys

import ray
from ray.util.placement_group import placement_group, remove_placement_group

QUIET_SECONDS = 60.0  # between two lines while it waits


def wait_for_gpus(count: int) -> None:
    """Return once the connected cluster has so many free GPUs."""
    group = placement_group([{"GPU": 1}] * count)
    while not group.wait(QUIET_SECONDS):
        present = int(ray.cluster_resources().get("GPU", 0))
        print(f"waiting for {count} free GPUs; the cluster has {present}", flush=True)
    remove_placement_group(group)


def main() -> None:
    count, *command = sys.argv[1:] or [""]
    if not count.isdecimal() or not int(count) or not command:
        sys.exit(_fail("gpus: give a number of at least 1 and a command: python -m jobs.with_gpus 16 COMMAND"))
    try:
        ray.init("auto", logging_level="ERROR", log_to_driver=False)
    except ConnectionError:
        sys.exit(_fail("address: no Ray cluster is running here, and RAY_ADDRESS names none"))
    wait_for_gpus(int(count))
    ray.shutdown()
    os.execvp(command[0], command)


def _fail(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    main()
