"""The process on every node of a job: a node of its Ray cluster, which ends with this process.

It reads the cluster's token from standard input, and later the line that ends it. Ray's files and the token lie in a
directory of the node that only its user can read. All ports are chosen by the kernel, so that several jobs, and other
users' clusters, can share a node.

A node that outlives the job's first one, and with it the command, requeues the job: Slurm does not, because it was told
not to end the job when it loses a node. In a container it was not told so, as Slurm's commands are missing there.
"""

import argparse
import ctypes
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import zlib
from contextlib import suppress
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

from shardprune.cluster.slurm.processes import END
from shardprune.cluster.slurm.queueing import remaining_nodes, requeue
from shardprune.standard_streams import outputs
from shardprune.storage.json_file import dump_json

TOKEN = "token"
START_LOG = "start.log"
ADDRESS = "ray_current_cluster"  # file that Ray writes when a node has joined its cluster
PR_SET_CHILD_SUBREAPER = 36  # of linux/prctl.h
CLOSED = "closed"  # the line that stands for the end of standard input
WATCH_SECONDS = 10.0
STOP_SECONDS = 3.0  # for Ray to end; remaining processes are then ended with their parent
# Ports of which 0 lets the kernel choose.
PORTS = (
    "node-manager-port",
    "object-manager-port",
    "min-worker-port",
    "max-worker-port",
    "dashboard-agent-listen-port",
    "dashboard-agent-grpc-port",
    "runtime-env-agent-port",
    "metrics-export-port",
)
# Ray's client server is not used, but starts anyway and needs a port: below the kernel's ephemeral range, and above
# the ports of Ray's own choice.
CLIENT_PORTS = range(20000, 32768)
# The longest path of a socket that Ray appends to its directory; Linux limits the whole to 107 characters.
LONGEST_SOCKET = len("/session_2026-11-22_12-00-00_000000_1234567/sockets/plasma_store")
LONGEST_NAME = len("/sp-123456789-01234567")
LONGEST_TMP = 107 - LONGEST_SOCKET - LONGEST_NAME


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m shardprune.cluster.slurm.node", description=__doc__)
    parser.add_argument("--address", help="host:port of the cluster's head (default: be the head)")
    parser.add_argument(
        "--first", help="the job's first node, whose loss requeues the job (default: Slurm sees to that)"
    )
    parser.add_argument("--tmp", default="/tmp", help="directory of the node for Ray's files")
    parser.add_argument("--object-store", type=int, help="bytes of the object store")
    options = parser.parse_args(arguments)
    happened: SimpleQueue[str] = SimpleQueue()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: happened.put(END))
    _adopt_orphans()
    token = sys.stdin.readline().strip()
    threading.Thread(target=_listen, args=(happened,), daemon=True).start()
    folder = make_folder(Path(options.tmp))
    try:
        (folder / TOKEN).write_text(token)
        code, orphan = _serve(folder, start_command(folder, options.address, options.object_store), happened)
    finally:
        _end_children()
        _remove(folder)
    if orphan and options.first:
        _watch(options.first, happened)
    return code


def make_folder(tmp: Path) -> Path:
    """Create a directory for this job on this node; files of an earlier attempt are removed."""
    node = zlib.crc32(os.environ["SLURMD_NODENAME"].encode())
    folder = tmp / f"sp-{os.environ['SLURM_JOB_ID']}-{node:08x}"
    _remove(folder)
    folder.mkdir(mode=0o700)
    return folder


def start_command(folder: Path, address: str | None, object_store: int | None) -> list[str]:
    """Return the command that starts a Ray node with the CPUs and GPUs that the job has on this node."""
    role = {"address": address} if address else _head_options()
    options = {
        **role,
        **dict.fromkeys(PORTS, 0),
        "num-cpus": os.environ["SLURM_CPUS_ON_NODE"],
        "num-gpus": os.environ.get("SLURM_GPUS_ON_NODE") or 0,
        "temp-dir": folder,
        "include-log-monitor": "false",  # commands have no lines of workers sent to them
        **({"object-store-memory": object_store} if object_store else {}),
    }
    flags = [f"--{name}={value}" for name, value in options.items()]
    kind = [] if address else ["--head"]
    return [sys.executable, "-m", "ray.scripts.scripts", "start", *kind, "--block", "--disable-usage-stats", *flags]


def _head_options() -> dict[str, Any]:
    """Return the head's own options, above all the address at which its host name resolves for other nodes."""
    options = {"port": 0, "ray-client-server-port": _free_port(), "include-dashboard": "false"}
    try:
        address = socket.gethostbyname(os.environ["SLURMD_NODENAME"])
    except OSError:
        return options  # Ray then chooses an address
    return options if address.startswith("127.") else options | {"node-ip-address": address}


def _free_port() -> int:
    while True:
        port = random.choice(CLIENT_PORTS)
        with socket.socket() as trial:
            try:
                trial.bind(("", port))
            except OSError:
                continue
            return port


def _serve(folder: Path, command: list[str], happened: "SimpleQueue[str]") -> tuple[int, bool]:
    """Run a Ray node until it ends or is stopped; return its exit code, and whether the job may have lost its first
    node.
    """
    environment = {
        **os.environ,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(folder / TOKEN),
        "RAY_ENABLE_ZERO_COPY_TORCH_TENSORS": "1",
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
    }
    with (folder / START_LOG).open("w") as log:
        ray = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=environment)
    node, joined = os.environ["SLURMD_NODENAME"], False
    while ray.poll() is None:
        if not joined and (address := _content(folder / ADDRESS)):
            joined = True
            print(dump_json({"node": node, "address": address, "folder": str(folder)}), flush=True)
        try:
            why = happened.get(timeout=1.0 if joined else 0.1)
        except Empty:
            continue
        _stop(ray)
        return 0, why == CLOSED
    print(f"error: Ray ended on {node} with code {ray.returncode}:", file=sys.stderr)
    print(*_last_lines(folder / START_LOG), sep="\n", file=sys.stderr, flush=True)
    return 1, joined


def _watch(first: str, happened: "SimpleQueue[str]") -> None:
    """Wait until this process is to end, or the job has lost its first node."""
    while True:
        nodes = remaining_nodes()
        if nodes and first not in nodes:
            print(f"{first}, the job's first node, is lost: {requeue() or 'requeued'}", file=sys.stderr, flush=True)
            return
        try:
            if happened.get(timeout=WATCH_SECONDS) != CLOSED:
                return
        except Empty:
            continue


def _content(file: Path) -> str:
    return file.read_text().strip() if file.exists() else ""


def _listen(happened: "SimpleQueue[str]") -> None:
    """Forward standard input: the line that ends this process, or its end, if the job's first node is lost."""
    happened.put(END if sys.stdin.readline().strip() == END else CLOSED)


def _stop(ray: "subprocess.Popen[bytes]") -> None:
    ray.terminate()
    try:
        ray.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        ray.kill()


def _adopt_orphans() -> None:
    """Become the parent of orphaned Ray processes, such as agents of a killed raylet."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def _end_children() -> None:
    """End Ray's remaining processes, and those orphaned by that."""
    deadline = time.monotonic() + STOP_SECONDS
    while time.monotonic() < deadline:
        children = {
            int(pid) for task in Path("/proc/self/task").iterdir() for pid in _content(task / "children").split()
        }
        if not children:
            return
        for child in children:
            with suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
            with suppress(ChildProcessError):
                os.waitpid(child, 0)


def _last_lines(log: Path, lines: int = 10) -> list[str]:
    return [line for line in log.read_text(errors="replace").splitlines() if line.strip()][-lines:]


def _remove(folder: Path) -> None:
    """Remove a directory to which ending processes may still write."""
    for _ in range(20):
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            return
        time.sleep(0.1)


if __name__ == "__main__":
    with outputs():
        code = main()
    sys.exit(code)
