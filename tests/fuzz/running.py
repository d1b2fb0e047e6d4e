"""Inputs one after another in forks of one process, each within limits of time and memory.

A fork takes a batch and tells where it is; where an input crashes or hangs it, it is killed, that input has failed, and
another fork goes on with the next.
"""

import contextlib
import io
import json
import os
import random
import resource
import select
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil

from tests.fuzz.kinds import KINDS, WELL_FORMED, Input, well_formed
from tests.fuzz.verdict import Outcome, judge, state_of

CPU_SECONDS, WALL_SECONDS = 20.0, 120.0  # of one input
IDLE_SECONDS = 20.0  # in which an input's process takes no time of a core: it waits for what will not come
MEMORY = 2**30  # bytes that an input may add to its process
BATCH = 40


@dataclass(frozen=True)
class Name:
    """The name of an input: which of a kind under a seed."""

    seed: int
    kind: str
    number: int

    def __str__(self) -> str:
        return f"{self.kind}:{self.number}"

    @property
    def folder(self) -> str:
        return f"{self.kind.replace(' ', '-')}-{self.number}"

    def build(self, material: Path, folder: Path) -> Input:
        """Make the input in a folder."""
        if self.kind == WELL_FORMED:
            return well_formed(material, folder, self.number)
        return KINDS[self.kind](material, folder, random.Random(f"{self.seed}:{self.kind}:{self.number}"))


@dataclass
class Tried:
    """An input that was tried: the words, how it ended, and what was wrong."""

    name: Name
    words: list[str] = field(default_factory=list)
    ended: str = ""
    problems: list[str] = field(default_factory=list)
    errors: str = ""
    seconds: float = 0.0


def prepare_process(heavy: bool) -> None:
    """Import what commands import, so that no fork has to; nothing may start a thread."""
    import transformers.models.llama.modeling_llama  # noqa: F401

    import shardprune.cli
    import shardprune.cluster.local_backend
    import shardprune.commands.evaluate
    import shardprune.commands.mop
    import shardprune.commands.pipeline
    import shardprune.commands.prune
    import shardprune.commands.recover
    import shardprune.planning.plan
    import shardprune.planning.training.plan
    import shardprune.report.page.write

    if heavy:
        import shardprune.evaluation.tasks  # noqa: F401


def tried(names: Sequence[Name], work: Path) -> Iterator[Tried]:
    """Try inputs in one fork after another."""
    left = list(names)
    while left:
        done = 0
        for result in _batch(left[:BATCH], work):
            done += 1
            yield result
        left = left[done:]


def _batch(names: Sequence[Name], work: Path) -> Iterator[Tried]:
    """Try inputs in one fork, up to the first that ends it."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reading)
        try:
            _carry_out(names, work, os.fdopen(writing, "w", buffering=1))
        except BaseException:  # a fault of the tests, which counts as a crash
            traceback.print_exc()
        finally:
            os._exit(1)
    os.close(writing)
    with os.fdopen(reading) as lines:
        for name in names:
            result = _watched(name, pid, lines)
            yield result
            if result.ended in ("crashed", "killed"):
                break
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    with contextlib.suppress(ChildProcessError):
        os.waitpid(pid, 0)


def _watched(name: Name, pid: int, lines: Any) -> Tried:
    """Wait for an input's end, or end it."""
    process, began = psutil.Process(pid), time.monotonic()
    moved = 0.0, 0.0  # seconds of a core, and of the clock when there were so many
    times, memory = process.cpu_times(), process.memory_info().rss
    while not select.select([lines], [], [], 0.02)[0]:
        try:
            now, resident = process.cpu_times(), process.memory_info().rss
        except psutil.NoSuchProcess:
            continue
        used = now.user + now.system - times.user - times.system
        wall = time.monotonic() - began
        if used > moved[0] + 0.02:
            moved = used, wall
        if used > CPU_SECONDS or wall > WALL_SECONDS or wall > moved[1] + IDLE_SECONDS:
            return _killed(name, process, f"hang: {used:.0f} s of a core, {wall:.0f} s in all")
        if resident - memory > MEMORY:
            return _killed(name, process, f"memory: {(resident - memory) / 2**30:.1f} GiB")
    line = lines.readline()
    if not line:
        _, status = os.waitpid(pid, 0)
        number = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
        how = signal.Signals(number).name if number else f"exit code {os.waitstatus_to_exitcode(status)}"
        return Tried(name, ended="crashed", problems=[f"crash: {how}"], seconds=time.monotonic() - began)
    return Tried(**{**json.loads(line), "name": name, "seconds": time.monotonic() - began})


def _killed(name: Name, process: psutil.Process, problem: str) -> Tried:
    process.kill()
    return Tried(name, ended="killed", problems=[problem])


def _carry_out(names: Sequence[Name], work: Path, answers: Any) -> None:
    """Try every input in this fork, and end it."""
    os.environ |= {"TOKENIZERS_PARALLELISM": "false", "COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"}
    os.environ |= {"SHARDPRUNE_STORAGE_PATIENCE": "1", "HF_HUB_OFFLINE": "1"}
    import torch

    torch.set_num_threads(1)
    address_space = psutil.Process().memory_info().vms + 4 * MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (address_space, address_space))
    resource.setrlimit(resource.RLIMIT_FSIZE, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _only_prepare_trainings()
    with open(os.devnull) as nothing:
        os.dup2(nothing.fileno(), 0)
    for name in names:
        result = try_input(name, work)
        answers.write(json.dumps({**asdict(result), "name": None}) + "\n")
    answers.flush()


def _only_prepare_trainings() -> None:
    """End a training where its processes would start: what is tried is what is read before."""
    from shardprune.cluster.local_backend import LocalBackend

    def train(*_: Any) -> None:
        raise SystemExit(0)

    LocalBackend.train = train  # type: ignore[assignment,method-assign]


def try_input(name: Name, work: Path) -> Tried:
    """Make an input, give it to its command, and judge."""
    folder = work / name.folder
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    made = name.build(work / "material", folder)
    before = state_of(folder)
    outcome = _called(made.words, folder, work / f"printed-{os.getpid()}")
    with contextlib.redirect_stderr(io.StringIO()):  # progress bars of the library that it compares with
        problems = judge(made.command, outcome, before, folder, name.kind == WELL_FORMED)
    if name.kind == WELL_FORMED and outcome.code != made.command.ends:
        problems.append(f"refused: {' '.join(made.words)}")
    ended = {0: "finished", 1: "stopped", 2: "refused"}.get(outcome.code, "failed")  # type: ignore[arg-type]
    shutil.rmtree(folder, ignore_errors=True)
    return Tried(name, made.words, ended, problems, outcome.errors.decode(errors="replace")[-2000:])


def _called(words: list[str], folder: Path, printed: Path) -> Outcome:
    """Carry out a command line in this process as the command itself would."""
    from shardprune.cli import main

    os.chdir(folder)
    kept = os.dup(1), os.dup(2)
    streams = sys.stdout, sys.stderr
    code, crash = None, ""
    with printed.with_suffix(".out").open("wb") as output, printed.with_suffix(".err").open("wb") as errors:
        os.dup2(output.fileno(), 1)
        os.dup2(errors.fileno(), 2)
        sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
        sys.stderr = open(2, "w", encoding="utf-8", errors="backslashreplace", buffering=1, closefd=False)  # noqa: SIM115
        _retarget_logs()
        try:
            main(words)
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
        except BaseException as error:
            crash = _place_of(error)
        try:
            sys.stdout.flush()
        except UnicodeError as error:
            code, crash = None, _place_of(error)
        sys.stderr.flush()
        for target, source in zip((1, 2), kept, strict=True):
            os.dup2(source, target)
            os.close(source)
        sys.stdout, sys.stderr = streams
        _retarget_logs()
    os.chdir("/")
    return Outcome(code, printed.with_suffix(".out").read_bytes(), printed.with_suffix(".err").read_bytes(), crash)


def _retarget_logs() -> None:
    """Loggers of libraries print where this process prints now, as in a process of their own."""
    import logging

    for logger in (logging.getLogger(), *map(logging.getLogger, list(logging.root.manager.loggerDict))):
        for handler in logger.handlers:
            if type(handler) is logging.StreamHandler:
                handler.stream = sys.stderr


def _place_of(error: BaseException) -> str:
    """An exception's class, its place in the package, and its text."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "/shardprune/" in frame.filename]
    own = frames[-1] if frames else None
    place = f"{own.filename.rpartition('/shardprune/')[2]}:{own.name}" if own else "elsewhere"
    return f"{type(error).__name__} at {place}: {str(error)[:160]!r}"
