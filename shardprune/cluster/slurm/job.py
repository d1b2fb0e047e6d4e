"""The process of a job's batch script: a Ray cluster of the job's own, and one command of shardprune on it.

Head and other nodes of the cluster are steps of the job. The command is their driver and runs beside the head on the
job's first node; its exit code is the job's. Shortly before the time limit Slurm sends SIGUSR1: the command stops, its
finished layers stay, and the job is requeued, where the same command resumes.
"""

import argparse
import os
import secrets
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

from shardprune.cluster.slurm.container import Container
from shardprune.cluster.slurm.node import TOKEN
from shardprune.cluster.slurm.processes import Ended, Event, Line, Mailbox, Process, Signalled, Step
from shardprune.cluster.slurm.queueing import allocated_nodes, requeue
from shardprune.standard_streams import outputs
from shardprune.storage.json_file import parse_json
from shardprune.storage.malformed import Malformed

START_SECONDS = 300.0  # for Ray to start on the nodes; Python may be loaded from slow network storage
VARIABLES = ("SLURM_JOB_ID", "SLURMD_NODENAME", "SLURM_JOB_NODELIST")  # of every job
STOP_SECONDS = 15.0  # for Ray to end on the nodes
FINISHED = frozenset({0, 2})  # exit codes after which another attempt would do nothing or fail alike


class CannotStart(RuntimeError):
    """The cluster does not start."""


class StopRequested(Exception):
    """The job received a signal to stop."""


class Job:
    """One attempt at a job."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.folder = os.getcwd()
        mounts = [self.folder, options.tmp, *options.mount]
        self.container = Container.parse(options.container, mounts) if options.container else None
        self.id = os.environ["SLURM_JOB_ID"]
        self.head_node = os.environ["SLURMD_NODENAME"]
        self.on_head = ["--nodes=1", "--ntasks=1", f"--nodelist={self.head_node}"]
        self.nodes = allocated_nodes()
        self.restarts = int(os.environ.get("SLURM_RESTART_COUNT") or 0)
        # Variables of another cluster, which the submitting shell may use.
        others = {"RAY_ADDRESS", "RAY_AUTH_TOKEN"}
        self.environment = {name: value for name, value in os.environ.items() if name not in others} | {
            "SLURM_EXPORT_ENV": "ALL",
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "1",  # 0 keeps a cluster on loopback
            "PYTHONUNBUFFERED": "1",
            # A home that a container sees holds packages for another Python.
            **({"PYTHONNOUSERSITE": "1"} if self.container else {}),
        }
        self.events: Mailbox = SimpleQueue()
        self.steps: list[Step] = []
        self.driver: Process | None = None
        self.signals: list[signal.Signals] = []

    def run(self) -> int:
        """Run the attempt; return the job's exit code."""
        for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda number, _: self.events.put(Signalled(signal.Signals(number))))
        say(f"job {self.id}, attempt {self.restarts + 1} on {len(self.nodes)} nodes: {', '.join(self.nodes)}")
        try:
            code = self._drive(*self._start_ray())
        except CannotStart as error:
            say(f"error: {error}")
            code = 1
        except StopRequested:
            code = self._stop_driver()
        self._stop_ray()
        # Only SIGUSR1 announces a requeue: scancel and the final end of a job send SIGTERM.
        if self.signals == [signal.SIGUSR1] and code not in FINISHED:
            return self._requeue(code)
        return code

    def _start_ray(self) -> tuple[str, Path]:
        """Start the cluster; return its address, and the directory of its files on this node.

        Raises:
            CannotStart: the head did not start, or too many of the other nodes did not.
        """
        token = secrets.token_hex(32)
        head = self._step(self.on_head, token)
        deadline = time.monotonic() + START_SECONDS
        joined = self._joined(head, 1, deadline)
        if not joined:
            raise CannotStart(f"Ray's head did not come up on {self.head_node}")
        address = joined[0]["address"]
        others = len(self.nodes) - 1
        if others:
            where = [f"--nodes={others}", f"--ntasks={others}", f"--exclude={self.head_node}"]
            joined += self._joined(self._step(where, token, f"--address={address}"), others, deadline)
            if not self.steps[0].running:
                raise CannotStart(f"Ray's head on {self.head_node} ended while the other nodes were awaited")
        missing = sorted(set(self.nodes) - {node["node"] for node in joined})
        if missing:
            say(f"Ray did not come up on {', '.join(missing)}")
        if len(joined) < min(self.options.min_nodes or len(self.nodes), len(self.nodes)):
            raise CannotStart(f"Ray came up on {len(joined)} of {len(self.nodes)} nodes")
        return address, Path(joined[0]["folder"])

    def _step(self, where: list[str], token: str, *arguments: str) -> Step:
        """Start Ray's nodes on some nodes of the job."""
        store = self.options.object_store
        shared = [
            *([] if self.container else [f"--first={self.head_node}"]),
            f"--tmp={self.options.tmp}",
            *([f"--object-store={store}"] if store else []),
        ]
        words = self._inside(where, "shardprune.cluster.slurm.node", *shared, *arguments)
        step = Step(*words, token, self.events, self.environment)
        self.steps.append(step)
        return step

    def _inside(self, where: list[str], module: str, *arguments: str) -> tuple[list[str], list[str]]:
        """Return options and command of a step that runs a module, in the container if there is one."""
        if not self.container:
            return where, [sys.executable, "-m", module, *arguments]
        gpus = bool(os.environ.get("SLURM_GPUS_ON_NODE"))
        command = self.container.around(["python", "-m", module, *arguments], self.folder, gpus)
        return [*where, *self.container.srun_options(self.folder)], command

    def _joined(self, step: Step, nodes: int, deadline: float) -> list[dict[str, Any]]:
        """Return the messages of a step's nodes that have joined the cluster before the deadline."""
        joined: list[dict[str, Any]] = []
        while len(joined) < nodes:
            event = self._next(deadline)
            if event is None or (isinstance(event, Ended) and not (step.running and self.steps[0].running)):
                break
            if isinstance(event, Line):
                if (message := _message(event.text)) is None:
                    say(event.text)  # of what runs before the step, such as a container's banner
                else:
                    joined.append(message)
        return joined

    def _drive(self, address: str, folder: Path) -> int:
        """Run the command; return its exit code."""
        environment = self.environment | {
            "RAY_ADDRESS": address,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(folder / TOKEN),
        }
        command = self.options.command
        if self.container:
            words = self._inside(self.on_head, "shardprune.cluster.slurm.driver", *command)
            self.driver = Step(*words, "", self.events, environment, heard=False)
        else:
            self.driver = Process([sys.executable, "-m", "shardprune", *command], self.events, environment)
        while self.driver.running:
            event = self._next()
            if isinstance(event, Ended) and event.process is self.steps[0]:
                say("error: Ray's head ended before the command did")
                self._stop_driver()
                return 1
            if isinstance(event, Ended) and event.process in self.steps:
                say("Ray has ended on all nodes but the first")
        return self.driver.code

    def _next(self, deadline: float | None = None) -> Event | None:
        """Return the next event; None after the deadline.

        Raises:
            StopRequested: the event is a signal.
        """
        event = self._event(deadline)
        if isinstance(event, Signalled):
            say(f"told to stop by {event.number.name}")
            raise StopRequested
        return event

    def _event(self, deadline: float | None) -> Event | None:
        try:
            event = self.events.get(timeout=None if deadline is None else max(0.0, deadline - time.monotonic()))
        except Empty:
            return None
        if isinstance(event, Signalled):
            self.signals.append(event.number)
        return event

    def _until(self, done: Callable[[], bool], seconds: float) -> None:
        """Wait until `done` returns true, at most `seconds`; signals do not interrupt it."""
        deadline = time.monotonic() + seconds
        while not done() and self._event(deadline) is not None:
            pass

    def _stop_driver(self) -> int:
        """Stop the command and return its exit code; if it had not started, that of a stopped command."""
        driver = self.driver
        if driver is None:
            return 128 + signal.SIGTERM
        driver.terminate()
        # Slurm follows SIGTERM with SIGKILL, some 30 s later.
        self._until(lambda: not driver.running, 10.0 if signal.SIGTERM in self.signals else self.options.notice / 2)
        driver.kill()
        return driver.code

    def _stop_ray(self) -> None:
        for step in reversed(self.steps):
            step.terminate()
        self._until(lambda: not any(step.running for step in self.steps), STOP_SECONDS)
        for step in self.steps:
            step.kill()

    def _requeue(self, code: int) -> int:
        if self.restarts >= self.options.max_requeues:
            say(f"error: the job was requeued {self.restarts} times already; submit it again to go on")
            return code
        refused = requeue()
        say(f"error: the job is not requeued ({refused}); submit it again to go on" if refused else "requeued")
        return code


def _message(line: str) -> dict[str, Any] | None:
    """Return what a node that has joined the cluster says; None if a line is not that."""
    try:
        message = parse_json(line)
    except Malformed:
        return None
    return message if isinstance(message, dict) and message.keys() >= {"node", "address", "folder"} else None


def say(text: str) -> None:
    print(f"slurm {time.strftime('%H:%M:%S')}  {text}", file=sys.stderr, flush=True)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m shardprune.cluster.slurm.job", description=__doc__)
    parser.add_argument("--min-nodes", type=int, help="start with this many nodes if Ray does not start on all")
    parser.add_argument("--notice", type=int, default=120, help="seconds from SIGUSR1 to the time limit")
    parser.add_argument("--max-requeues", type=int, default=50, help="maximum number of requeues")
    parser.add_argument("--object-store", type=int, help="bytes of each node's object store")
    parser.add_argument("--tmp", default="/tmp", help="directory of every node for Ray's files")
    parser.add_argument("--container", help="image of the processes, apptainer:IMAGE or pyxis:IMAGE")
    parser.add_argument("--mount", action="append", default=[], help="directory that is seen inside; repeatable")
    parser.add_argument("command", nargs="+", help="a command of shardprune and its options, after --")
    options = parser.parse_args(arguments)
    if missing := [name for name in VARIABLES if name not in os.environ]:
        say(f"error: {missing[0]} is not set: this is the process of a job that `shardprune slurm` has written")
        return 2
    try:
        job = Job(options)
    except ValueError as error:
        say(f"error: container: {options.container!r} is not allowed; {error}")
        return 2
    return job.run()


if __name__ == "__main__":
    with outputs():
        code = main()
    sys.exit(code)
