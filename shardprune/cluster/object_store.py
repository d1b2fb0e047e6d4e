"""The object store of a node: memory for waves, sums and weights that workers send each other."""

from collections.abc import Iterable

from shardprune.cluster.layout import Layout
from shardprune.solvers.triangles import lower_entries

MIN_STORE_BYTES = 128 * 2**20


def store_bytes(layout: Layout, wave: int, columns: Iterable[int] = (), sent: int = 0) -> int:
    """Return the bytes that the object store of a node must have.

    Args:
        wave: bytes of one wave.
        columns: of each input of a layer for which replicas exchange sums: float32, the lower triangle of columns x
            columns.
        sent: bytes of weights and gradients that workers send each other.
    """
    waves = 4 * wave * (len(layout.shards) + 3 * layout.replicas)
    sums = (layout.replicas - 1) * sum(4 * lower_entries(count) for count in columns)
    return max(MIN_STORE_BYTES, waves + sums + sent)
