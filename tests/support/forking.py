"""Ray's worker processes as forks of one process that has imported torch, transformers and shardprune.

These imports take every worker of a run more than four seconds of a core: most of the time of the tests that start
Ray. Ray starts a worker by a file that sets up the environment of its job. Here this is a file that hands all that Ray
gave it to a process that was started once, and a fork of this becomes the worker. All else stays: a fork is a process
of its own, which imports Ray, registers with its node, and is killed and dies as others are and do.

tests/cluster/slurm, tests/jobs and the commands that tests run as users do have workers that Ray starts by itself.
"""

import gc
import json
import os
import runpy
import signal
import socket
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil

RAY_NEEDS = ("google.protobuf.internal.builder", "jsonschema", "pdb", "requests")
FOLDER = "SHARDPRUNE_TEST_FORKS"
SETTING_UP = "setting_up.py"
# Takes the place of Ray's setup_worker.py, whose imports take a third of a second; it lives as long as the worker.
SET_UP = """
import json, os, socket, sys
CONTEXT = "--serialized-runtime-env-context="
words, context = [], {}
for word in sys.argv[1:]:
    if word.startswith(CONTEXT):
        context = json.loads(word[len(CONTEXT):])
    elif not word.startswith("--language="):
        words.append(word)
for name, value in (context.get("env_vars") or {}).items():
    os.environ[name] = os.path.expandvars(value)
with socket.socket(socket.AF_UNIX) as asking:
    asking.connect(os.path.join(os.path.dirname(__file__), "socket"))
    wanted = {"words": words, "environment": dict(os.environ), "folder": os.getcwd()}
    socket.send_fds(asking, [b"*"], [0, 1, 2])
    asking.sendall(json.dumps(wanted).encode() + b"\\n")
    asking.recv(1)
"""


@contextmanager
def forks() -> Iterator[None]:
    """In the block the workers of this process, and of those that have its environment, are forks."""
    with tempfile.TemporaryDirectory(prefix="forks-") as folder, socket.socket(socket.AF_UNIX) as listener:
        Path(folder, SETTING_UP).write_text(SET_UP)
        listener.bind(f"{folder}/socket")
        listener.listen(64)
        server = psutil.Popen(
            [sys.executable, "-m", "tests.support.forking", str(listener.fileno())],
            pass_fds=[listener.fileno()],
            # The first is what Ray sets for a worker of one CPU, the second what a training on CPUs sets.
            env={**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
        )
        environment = {"RAY_RUNTIME_ENV_HOOK": "tests.support.forking.hook", FOLDER: folder}
        os.environ |= environment
        ray_constants = constants_of_ray()
        before = ray_constants.SETUP_WORKER_FILENAME
        try:
            hook(None)
            yield
        finally:
            ray_constants.SETUP_WORKER_FILENAME = before
            for name in environment:
                os.environ.pop(name, None)
            for process in (*server.children(recursive=True), server):
                process.kill()
            server.wait()


def fork(words: list[str], streams: list[int], environment: dict[str, str]) -> socket.socket:
    """Let a fork carry out a Python file within `forks`; the connection that is returned closes when it has ended.

    Args:
        words: the file and its arguments.
        streams: descriptors of its standard input, output and error.
        environment: the variables that it has.
    """
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(f"{os.environ[FOLDER]}/socket")
    wanted = {"words": words, "environment": environment, "folder": os.getcwd()}
    socket.send_fds(connection, [b"*"], streams)
    connection.sendall(json.dumps(wanted).encode() + b"\n")
    return connection


def hook(runtime_env: dict[str, Any] | None) -> dict[str, Any] | None:
    """Let the workers of clusters that this process starts from now on be forks; Ray calls this for each job."""
    constants_of_ray().SETUP_WORKER_FILENAME = f"{os.environ[FOLDER]}/{SETTING_UP}"
    return runtime_env


def constants_of_ray() -> ModuleType:
    """Ray's own constants, with those settings that shardprune makes before it imports Ray."""
    import_module("shardprune.cluster.ray_backend")
    return import_module("ray._private.ray_constants")


def main() -> None:
    """Import, then fork for whoever asks. Nothing here may start a thread, which a fork would not have."""
    listener = socket.socket(fileno=int(sys.argv[1]))
    import setuptools  # noqa: F401  before DeepSpeed imports distutils, which it replaces
    import transformers.models.llama.modeling_llama  # noqa: F401  and torch

    # All that workers need but Ray, and what takes most of Ray's own import.
    for module in (*RAY_NEEDS, "shardprune.cluster.local_backend", "shardprune.recovery.training"):
        import_module(module)

    assert len(os.listdir("/proc/self/task")) == 1, "an import has started a thread"
    assert "ray" not in sys.modules, "Ray reads the job and the node that a worker belongs to when it is imported"
    gc.freeze()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for a fork's end
    while True:
        asking, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            become_worker(asking)
            return  # only now the connection closes, which tells the other end
        asking.close()


def become_worker(asking: socket.socket) -> None:
    """Be the process that is asked for."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.setpgid(0, 0)  # with a worker Ray ends all processes of its group
    _, streams, _, _ = socket.recv_fds(asking, 1, 3)
    wanted = json.loads(asking.makefile().readline())
    for target, stream in enumerate(streams):
        os.dup2(stream, target)
        os.close(stream)
    os.environ.clear()
    os.environ |= wanted["environment"]
    os.chdir(wanted["folder"])
    sys.argv = wanted["words"]
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
