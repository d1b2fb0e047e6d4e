"""The size of a node's object store: memory for tensors under way between workers."""

from collections.abc import Iterable

from shardprune.cluster.layout import Layout


def store_bytes(layout: Layout, wave: int, columns: Iterable[int], sent: int) -> int:
    """Return the bytes that the object store of a node needs.

    Args:
        wave: bytes of one wave.
        columns: of each input of a layer; replicas exchange its Gram matrix, float32 [columns, columns].
        sent: bytes of weights and gradients that workers send one another.
    """
    waves = 4 * wave * (len(layout.shards) + 3 * layout.replicas)
    sums = (layout.replicas - 1) * sum(4 * count**2 for count in columns)
    return max(MIN_STORE_BYTES, waves + sums + sent)


MIN_STORE_BYTES = 128 * 2**20
