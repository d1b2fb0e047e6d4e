"""A standing Ray cluster of one node, started as a user starts it, and jobs that are submitted to it."""

import os
import random
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import psutil

REPOSITORY = Path(__file__).resolve().parents[2]
START_SECONDS = 240.0


class Head:
    """A head with token authentication, and ports and a directory of its own."""

    def __init__(self, folder: Path) -> None:
        port, self.dashboard, agent, agent_grpc, environment, metrics, client = free_ports(7)
        self._environment = {
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
        }
        self._environment.pop("RAY_ADDRESS", None)
        options = {
            "node-ip-address": "127.0.0.1",
            "port": port,
            "dashboard-host": "127.0.0.1",
            "dashboard-port": self.dashboard,
            "dashboard-agent-listen-port": agent,
            "dashboard-agent-grpc-port": agent_grpc,
            "runtime-env-agent-port": environment,
            "metrics-export-port": metrics,
            "ray-client-server-port": client,
            "min-worker-port": 0,
            "max-worker-port": 0,
            "num-cpus": 4,
            "num-gpus": 2,  # which nobody computes on
            "object-store-memory": 200_000_000,
            "temp-dir": folder,
        }
        command = ["ray", "start", "--head", "--block", "--disable-usage-stats"]
        self._log = folder / "head.log"
        with open(self._log, "w") as log:
            self._process = psutil.Popen(
                [*command, *(f"--{name}={value}" for name, value in options.items())],
                env=self._environment,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def wait(self) -> None:
        """Return once jobs can be submitted."""
        url = f"http://127.0.0.1:{self.dashboard}/api/jobs/"
        token = {"Authorization": f"Bearer {self._environment['RAY_AUTH_TOKEN']}"}
        deadline = time.monotonic() + START_SECONDS
        while True:
            with suppress(OSError), urllib.request.urlopen(urllib.request.Request(url, headers=token), timeout=5):
                return
            assert self._process.is_running(), self._log.read_text()
            assert time.monotonic() < deadline, self._log.read_text()
            time.sleep(0.2)

    def submit(
        self,
        *command: str,
        wait: bool = True,
        name: str | None = None,
        environment: str | Path = "ray_configs/runtime_env.yaml",
    ) -> "subprocess.Popen[str]":
        """Submit a command with the repository as its working directory."""
        options = ["--working-dir=.", f"--runtime-env={environment}"]
        options += [] if wait else ["--no-wait"]
        options += [f"--submission-id={name}"] if name else []
        return self.job("submit", *options, "--", *command)

    def job(self, verb: str, *arguments: str) -> "subprocess.Popen[str]":
        """`ray job VERB`, as a process whose output is both of its streams."""
        return subprocess.Popen(
            ["ray", "job", verb, f"--address=http://127.0.0.1:{self.dashboard}", *arguments],
            env=self._environment,
            cwd=REPOSITORY,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def processes(self) -> list[psutil.Process]:
        """The head and all that it has started."""
        with suppress(psutil.NoSuchProcess):
            return [self._process, *self._process.children(recursive=True)]
        return []

    def busy(self) -> list[str]:
        """What runs of drivers and workers that do the work of a job."""
        titles = [" ".join(_words(process)) for process in self.processes()]
        return [title for title in titles if "-m jobs." in title or "ray::PruneActor" in title]

    def command(self, job: str) -> psutil.Process | None:
        """The process of a job's command, once it has started."""
        return next((process for process in self.processes() if _words(process)[1:3] == ["-m", job]), None)

    def close(self) -> None:
        processes = self.processes()
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(processes, timeout=30)


def _words(process: psutil.Process) -> list[str]:
    """The command line of a process, which may be gone."""
    with suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
        return process.cmdline()
    return []


def is_told_to_stop(process: psutil.Process) -> bool:
    """Whether a suspended process has a SIGTERM to act on once it is resumed."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    pending = next(line.split()[1] for line in status.splitlines() if line.startswith("ShdPnd:"))
    return bool(int(pending, 16) >> (signal.SIGTERM - 1) & 1)


@contextmanager
def head() -> Iterator[Head]:
    """A head that ends, with all that it started, when the block does."""
    folder = Path(tempfile.mkdtemp(prefix="sp-", dir="/tmp"))  # short: Ray's sockets lie inside
    standing = Head(folder)
    try:
        standing.wait()
        yield standing
    finally:
        standing.close()
        shutil.rmtree(folder, ignore_errors=True)


def free_ports(count: int) -> list[int]:
    """Ports of the loopback interface on which nothing listens, and of which the kernel gives none to others before
    they are taken: it gives those from 32768 on."""
    found: list[int] = []
    with ExitStack() as stack:
        while len(found) < count:
            port = random.randrange(20_000, 32_000)
            with suppress(OSError):
                stack.enter_context(socket.socket()).bind(("127.0.0.1", port))
                found.append(port)
    return found
