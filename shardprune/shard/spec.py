"""What a worker is told when it starts."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from shardprune.solvers.barber import Rebuilding
from shardprune.structure.scoring import Scoring
from shardprune.structure.shape import Widths


@dataclass(frozen=True)
class WorkerSpec:
    """All that a worker must know, as plain values that travel to another process.

    `method` prunes by `pattern`, or is None where `sparse` names a checkpoint that holds the pruned weights (their
    pattern may be `auto`, what the zeros show) or where `scoring` chooses structures that are removed, so that
    finished layers have the `widths`.
    `activation_bytes` is what the waves that it keeps take, `finished` are the layers whose files are in
    `out` already.
    """

    model: str
    out: str
    fingerprint: str
    shard: int
    replica: int
    layers: Sequence[int]
    method: str | None
    pattern: str
    sparse: str | None
    rebuilding: Rebuilding | None
    scoring: Scoring | None
    widths: Widths | None
    measure_error: bool
    weights: Literal["resident", "streamed"]
    activations: Literal["auto", "device", "host"]
    activation_bytes: int
    device: str
    dtype: str
    threads: int
    finished: frozenset[int]
