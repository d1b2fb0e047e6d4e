"""The start-up arguments of a worker."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch

from shardprune.model.draft import Draft
from shardprune.model.pruning_job import PruningJob
from shardprune.model.sources import SourceState
from shardprune.model.structure.shape import Widths


@dataclass(frozen=True)
class WorkerSettings:
    """The settings that all workers of a run share, as plain values that travel to another process.

    `model` is the checkpoint as every process finds it, `dtype` torch's name of the compute dtype. Where layers are
    `streamed`, a worker holds one and reads the next ahead. `exchange` is `auto` where one process is all.
    """

    model: str
    device: str
    dtype: str
    threads: int
    streamed: bool
    activations: Literal["auto", "device", "host"]
    exchange: Literal["auto", "group", "store"] = "auto"

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype of the computation."""
        return getattr(torch, self.dtype)


@dataclass(frozen=True)
class ForwardSpec:
    """The arguments of a worker that only lets waves pass through.

    `activation_bytes` is the size of the waves that it keeps, `other_bytes` what else its device must hold at the same
    time: layers, sums, and the largest workspace. `model` is the checkpoint as the driver has opened it, where one has;
    `ignore` are globs over the names of projections that are left alone; `samples` is the number of calibration
    sequences of all replicas, where there are any, and `held_out` that of those which nothing is calibrated on.
    """

    settings: WorkerSettings
    shard: int
    replica: int
    layers: Sequence[int]
    activation_bytes: int
    other_bytes: int = field(default=0, kw_only=True)
    model: SourceState | None = field(default=None, kw_only=True)
    samples: int = field(default=0, kw_only=True)
    held_out: int = field(default=0, kw_only=True)
    ignore: tuple[str, ...] = field(default=(), kw_only=True)

    @property
    def label(self) -> str:
        """The worker's name in messages."""
        return f"worker {self.shard}.{self.replica}"


@dataclass(frozen=True)
class GenerationSpec(ForwardSpec):
    """The arguments of a worker that writes text after a `draft`, one of `workers` that may share a machine's memory.

    Where layers are streamed, they stay in memory all the same if there is room for all of the shard's.
    """

    draft: Draft
    workers: int


@dataclass(frozen=True)
class Need:
    """The least memory of a worker: `bytes` of its device at the `step` that takes most, and what would take less."""

    bytes: int
    step: str
    helps: str


@dataclass(frozen=True)
class WorkerSpec(ForwardSpec):
    """The arguments of a worker that changes layers by a `job`.

    `widths` are those of finished layers, where all get the same; `finished` are the layers whose files are in `out`
    already; `need` is the least memory, where that is known; `sparse` is the sparse checkpoint, where there is one.
    """

    out: str
    fingerprint: str
    job: PruningJob
    widths: Widths | None
    finished: frozenset[int]
    need: Need | None = None
    sparse: SourceState | None = None
