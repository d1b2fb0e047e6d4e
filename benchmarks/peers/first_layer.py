"""CPU seconds of a process before its first layer: python -m benchmarks.peers.first_layer prune MODEL --out OUT ...

The process ends when the first wave would be accumulated.
"""

import json
import sys
import time

from shardprune.cli import main as command_line
from shardprune.recipes.commands import COMMANDS


class FirstLayer(BaseException):
    """Raised where the work on the first layer begins."""


def main() -> None:
    _ = COMMANDS["prune"].story  # as the command line imports it in a moment
    imported = time.process_time()
    from shardprune.shard.prune_worker import PruneWorker

    def accumulate(*_: object) -> None:
        raise FirstLayer

    PruneWorker.accumulate = accumulate  # type: ignore[method-assign, assignment]
    try:
        command_line(sys.argv[1:])
    except FirstLayer:
        print(json.dumps({"imports": imported, "first layer": time.process_time()}))


if __name__ == "__main__":
    main()
