"""A sandbox of Slurm on the command line. Needs root.

    python -m tests.cluster.slurm up 3            start munged, slurmctld, 3 slurmd; wait until all are idle
    python -m tests.cluster.slurm status          one line per daemon, then sinfo
    python -m tests.cluster.slurm exec NODE CMD   run a command inside a node
    python -m tests.cluster.slurm kill-node NODE  power failure: kill everything on the node at once
    python -m tests.cluster.slurm start-node NODE start a killed node again
    python -m tests.cluster.slurm down [--keep]   stop everything that `up` started; --keep leaves the logs

Clients need SLURM_CONF=$SLURM_SANDBOX_DIR/etc/slurm.conf.
"""

import argparse
import os
import sys

from tests.cluster.slurm.sandbox import NotUp, Sandbox, why_not


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    up = commands.add_parser("up")
    up.add_argument("nodes", type=int)
    for name, default in (("cpus", 4), ("memory", 8000), ("gpus", 0), ("port", 16817)):
        up.add_argument(f"--{name}", type=int, default=default)
    for name, default in (("requeue-wait", 10), ("kill-wait", 5), ("node-timeout", 10)):
        up.add_argument(f"--{name}", type=int, default=default, help="seconds")
    up.add_argument("--subnet", default="10.77.0")
    commands.add_parser("down").add_argument("--keep", action="store_true")
    commands.add_parser("status")
    for name in ("kill-node", "start-node", "init", "exec"):
        commands.add_parser(name).add_argument("node")
    commands.choices["exec"].add_argument("words", nargs=argparse.REMAINDER)
    given = vars(parser.parse_args())
    sandbox, command = Sandbox(os.environ.get("SLURM_SANDBOX_DIR", "/tmp/slurm-sandbox")), given.pop("command")
    try:
        if command == "up":
            if lacks := why_not():
                sys.exit(lacks)
            sandbox.up(**given)
            print(sandbox.status())
        elif command == "down":
            sandbox.down(**given)
        elif command == "status":
            print(sandbox.status())
        elif command == "exec":
            words = sandbox.command_inside(given["node"], *given["words"])
            os.execvpe(words[0], words, sandbox.environment)
        else:
            {"kill-node": sandbox.kill_node, "start-node": sandbox.start_node, "init": sandbox.run_init}[command](
                given["node"]
            )
    except NotUp as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
