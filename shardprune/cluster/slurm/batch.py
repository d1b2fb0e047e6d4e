"""The options of a Slurm job and its batch script."""

import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field, field_validator, model_validator

from shardprune.cluster.slurm.container import MOUNT, MOUNT_FORMS, Container
from shardprune.cluster.slurm.node import LONGEST_TMP
from shardprune.errors import InputError
from shardprune.recipes.commands import COMMANDS
from shardprune.recipes.settings import Settings, optional

# Slurm's forms: M, M:S, H:M:S, D-H, D-H:M, D-H:M:S
TIME = re.compile(r"(?:(?P<days>\d+)-)?(?P<first>\d+)(?::(?P<second>\d+))?(?::(?P<third>\d+))?")
TIME_FORMS = "minutes, minutes:seconds, hours:minutes:seconds, days-hours, days-hours:minutes[:seconds]"
# What ends a line, or is no text; a tab may stand in a line.
CONTROL = re.compile("[\x00-\x08\x0a-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
MEMORY = re.compile(r"\d+([KMGTP]B?)?", re.IGNORECASE)  # as Slurm writes it, without a letter in MB
LEAST_STORE = 0.08  # GiB, of which Ray takes no less
EARLY_SECONDS = 60  # by which Slurm may send a signal before its time


class Nodes(Settings):
    """Nodes of a job."""

    title: ClassVar[str] = "Nodes"

    nodes: int = Field(1, ge=1, description="Number of nodes")
    min_nodes: int | None = optional("all", "Fewest nodes to start and restart on", ge=1)
    gpus_per_node: int = Field(0, ge=0, description="GPUs per node")
    cpus_per_node: int | None = optional("whole node, exclusive", "CPUs per node", ge=1)
    mem: str | None = optional("whole node, else the partition's", "Memory per node, such as 500G")
    object_store: float | None = optional("30 % of memory", "GiB per node for Ray's object store", ge=LEAST_STORE)
    tmp: str = Field("/tmp", description=f"Node-local directory for Ray, at most {LONGEST_TMP} characters")

    @field_validator("mem")
    @classmethod
    def _memory_parses(cls, value: str | None) -> str | None:
        if value is not None and not MEMORY.fullmatch(value):
            raise ValueError("use a number of MB, or one with K, M, G or T behind it, such as 500G")
        return value

    @field_validator("tmp")
    @classmethod
    def _sockets_have_room(cls, value: str) -> str:
        if not value.startswith("/") or len(value.encode()) > LONGEST_TMP:
            raise ValueError(f"use an absolute path of at most {LONGEST_TMP} characters, for the sockets in it")
        return value

    @model_validator(mode="after")
    def _range_of_nodes(self) -> "Nodes":
        if self.min_nodes and self.min_nodes > self.nodes:
            raise InputError("min_nodes", f"{self.min_nodes} is more than nodes, {self.nodes}")
        return self


class Queue(Settings):
    """Limits and queue of a job."""

    title: ClassVar[str] = "Queue"

    time: str | None = optional("the partition's", f"Time limit of one attempt: {TIME_FORMS}")
    notice: int = Field(120, ge=10, le=65535, description="Seconds before the limit to stop and requeue")
    max_requeues: int = Field(50, ge=0, description="Maximum number of requeues")
    partition: str | None = optional("Slurm's", "Partition", min_length=1)
    account: str | None = Field(None, min_length=1, description="Account to charge")
    qos: str | None = Field(None, min_length=1, description="Quality of service")
    job_name: str | None = optional("the recipe's name", "Job name", min_length=1)
    output: str = Field("%x-%j.log", min_length=1, description="Log file; %x is the job's name, %j its number")
    sbatch: tuple[str, ...] = Field((), description="Further sbatch option, such as --constraint=a100; repeatable")

    @field_validator("time")
    @classmethod
    def _time_parses(cls, value: str | None) -> str | None:
        if value is not None and not _seconds(value):
            raise ValueError(f"use {TIME_FORMS}")
        return value

    @field_validator("sbatch")
    @classmethod
    def _options_are_options(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for option in value:
            if not re.match(r"--?[A-Za-z]", option):
                raise ValueError(f"{option!r} is no option of sbatch; use one that starts with -")
        return value

    @model_validator(mode="after")
    def _time_for_the_notice(self) -> "Queue":
        if self.time is not None and (_seconds(self.time) or 0) <= self.notice + EARLY_SECONDS:
            raise InputError(
                "time",
                f"{self.time!r} leaves no time before the notice, {self.notice} s before the limit and up to "
                f"{EARLY_SECONDS} s early",
            )
        return self


class Environment(Settings):
    """Environment of a job."""

    title: ClassVar[str] = "Environment"

    setup: tuple[str, ...] = Field(
        (), description="Shell line to run first, such as 'source /opt/env/bin/activate'; repeatable"
    )
    container: str | None = optional("none", "Image to run in: apptainer:IMAGE or pyxis:IMAGE")
    mount: tuple[str, ...] = Field(
        (), description="Directory that the container sees, as DIR or DIR:INSIDE; repeatable"
    )

    @field_validator("container")
    @classmethod
    def _container_has_a_form(cls, value: str | None) -> str | None:
        if value is not None:
            Container.parse(value)
        return value

    @field_validator("mount")
    @classmethod
    def _mounts_parse(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for mount in value:
            if not MOUNT.fullmatch(mount):
                raise ValueError(f"{mount!r} is no mount; {MOUNT_FORMS}")
        return value

    @model_validator(mode="after")
    def _mounts_have_a_container(self) -> "Environment":
        self.needs("container", self.container is not None, "mount")
        return self


class BatchJob(Nodes, Queue, Environment):
    """A job that runs one command of shardprune on a Ray cluster of its own."""

    @model_validator(mode="after")
    def _one_container(self) -> "BatchJob":
        for option in self.sbatch:
            if self.container and option.startswith("--container"):
                raise InputError("container", f"{self.container!r} and {option!r} exclude each other; use one of them")
        if self.container:
            _check_seen_inside("tmp", self.tmp)
        return self

    @model_validator(mode="after")
    def _each_on_a_line(self) -> "BatchJob":
        for name, value in self.model_dump().items():
            for text in value if isinstance(value, tuple) else (value,):
                if isinstance(text, str):
                    _check_line(name, text)
        return self

    def script(self, command: Sequence[str], folder: Path) -> str:
        """Return the script that runs a command and its options in a directory.

        Raises:
            InputError: the directory, or a word of the command, would end a line of the script.
        """
        for word in command:
            _check_line("overrides", word)
        _check_line("working directory", str(folder))
        if self.container:
            _check_seen_inside("working directory", str(folder))
        head = ("Written by `shardprune slurm`; docs/slurm.md explains it. Submit it again to go on after a failure.",)
        # Without lines that set up an environment it is the one that writes the script.
        python = "python" if self.setup else shlex.quote(sys.executable)
        return self.render(head, shlex.join(command), python, chdir=str(folder))

    def render(
        self, head: Sequence[str], command: str, python: str, chdir: str | None = None, before: Sequence[str] = ()
    ) -> str:
        """The script; `command` is text for the shell, on its last line."""
        wants = {
            "job-name": self.job_name,
            "chdir": chdir,
            "nodes": f"{self.min_nodes}-{self.nodes}" if self.min_nodes not in (None, self.nodes) else self.nodes,
            "gpus-per-node": self.gpus_per_node or None,
            "cpus-per-task": self.cpus_per_node,
            "exclusive": None if self.cpus_per_node else True,
            "mem": self.mem or (None if self.cpus_per_node else 0),
            "time": self.time,
            "partition": self.partition,
            "account": self.account,
            "qos": self.qos,
            "output": self.output,
            "open-mode": "append",
            "signal": f"B:USR1@{self.notice}",
            "requeue": True,  # when its first node is lost
            # When another one is: the command goes on without it. Inside a container nobody could tell them apart.
            "no-kill": None if self.container else True,
        }
        options = [_option(name, value) for name, value in wants.items() if value is not None]
        own = {
            "min-nodes": self.min_nodes,
            "notice": self.notice,
            "max-requeues": self.max_requeues,
            "object-store": self.object_store and int(self.object_store * 2**30),
            "tmp": self.tmp,
            "container": self.container,
        }
        words = [_option(name, value) for name, value in own.items() if value is not None]
        words += [_option("mount", mount) for mount in self.mount]
        lines = [
            "#!/bin/bash",
            *(f"# {line}".rstrip() for line in head),
            *(f"#SBATCH {option}" for option in (*options, *map(_directive, self.sbatch))),
            "",
            "trap '' USR1  # comes before the time limit; until Python listens to it, it must not end this shell",
            *self.setup,
            *before,
            f"exec {python} -m shardprune.cluster.slurm.job {' '.join(words)} -- {command}",
        ]
        return "\n".join(lines) + "\n"


def standing_script() -> str:
    """Return cluster/slurm/shardprune.sbatch: command, recipe and options come from sbatch's command line."""
    head = (
        "sbatch --nodes 4 --gpus-per-node 8 --time 04:00:00 cluster/slurm/shardprune.sbatch prune RECIPE --out OUT",
        "",
        "Runs `shardprune COMMAND` with a recipe on a Ray cluster of the job's own; docs/slurm.md explains it. Options",
        "before the script's name override those below, options after RECIPE override the recipe. Python is that of",
        "the shell which submits; lines that set up another one belong above the last lines.",
    )
    words = (
        'words=("${1:?COMMAND is missing}" --recipe "${2:?RECIPE is missing}" "${@:3}")',
        *(f"[ \"$1\" != {name} ] || unset 'words[1]'" for name, row in COMMANDS.items() if row.file_first),
    )
    return BatchJob.checked({"job_name": "shardprune"}).render(head, '"${words[@]}"', "python", before=words)


def _check_line(field: str, text: str) -> None:
    """Check that a text stays on its line of a script, where it could become an option or a command otherwise.

    Raises:
        InputError: it holds a control character.
    """
    if found := CONTROL.search(text):
        raise InputError(field, f"{text!r} holds {found[0]!r}; use text of one line, without control characters")


def _check_seen_inside(field: str, folder: str) -> None:
    """Check that a directory can be a mount of a container, in whose words a comma and a colon have a meaning.

    Raises:
        InputError: it holds one.
    """
    if found := re.search("[,:]", folder):
        raise InputError(field, f"{folder!r} holds {found[0]!r}; a directory that a container sees has none")


def _option(name: str, value: Any) -> str:
    return f"--{name}" if value is True else shlex.quote(f"--{name}={value}")


def _directive(option: str) -> str:
    """Return an option of sbatch as its line has it: as it was given, or with its value quoted where that is several
    words."""
    name, mark, value = re.fullmatch(r"(-[^\s=]*)(=|\s+|$)(.*)", option).groups()  # type: ignore[union-attr]
    try:
        whole = len(shlex.split(value)) <= 1
    except ValueError:  # a quote without its end
        whole = False
    return option if whole else f"{name}{mark}{shlex.quote(value)}"


def _seconds(time: str) -> int | None:
    """The seconds of a time as Slurm writes it; None where it is not one."""
    match = TIME.fullmatch(time)
    if not match:
        return None
    days, first, second, third = (None if part is None else int(part) for part in match.groups())
    if days is not None:
        return ((days * 24 + (first or 0)) * 60 + (second or 0)) * 60 + (third or 0)
    if third is not None:
        return ((first or 0) * 60 + (second or 0)) * 60 + third
    return (first or 0) * 60 + (second or 0)
