"""What a worker is told when it starts."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from shardprune.model.structure.shape import Widths
from shardprune.solvers.rebuilding import Rebuilding
from shardprune.solvers.scoring import Scoring


@dataclass(frozen=True)
class ForwardSpec:
    """All that a worker must know which only lets waves pass through, as plain values that travel to another process.

    `activation_bytes` is what the waves that it keeps take.
    """

    model: str
    shard: int
    replica: int
    layers: Sequence[int]
    weights: Literal["resident", "streamed"]
    activations: Literal["auto", "device", "host"]
    activation_bytes: int
    device: str
    dtype: str
    threads: int


@dataclass(frozen=True)
class Need:
    """What a worker cannot do without: `bytes` of its device's memory at the `step` that takes most, and what would
    take less."""

    bytes: int
    step: str
    helps: str


@dataclass(frozen=True)
class WorkerSpec(ForwardSpec):
    """The same of a worker that changes layers.

    `method` prunes by `pattern`, or is None where `sparse` names a checkpoint that holds the pruned weights (their
    pattern may be `auto`, what the zeros show) or where `scoring` chooses structures that are removed, so that
    finished layers have the `widths`.
    `finished` are the layers whose files are in `out` already. `need` is what it takes, where that is known.
    """

    out: str
    fingerprint: str
    method: str | None
    pattern: str
    sparse: str | None
    rebuilding: Rebuilding | None
    scoring: Scoring | None
    widths: Widths | None
    measure_error: bool
    finished: frozenset[int]
    need: Need | None = None
