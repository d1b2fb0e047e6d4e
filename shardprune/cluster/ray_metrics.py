"""Metrics of a worker at its Ray node, for Ray's dashboard and Prometheus."""

from ray.util.metrics import Counter, Histogram

from shardprune.shard.ledger import OF_ONE_WAVE, Kind, Watcher
from shardprune.shard.prune_worker import PruneWorker

SOLVER_SECONDS = [0.01, 0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000]  # bounds of the histogram


def metrics(shard: int, replica: int) -> Watcher:
    """Return the function that a worker's ledger calls to feed the worker's metrics.

    Waves have the tag `verb`: what a wave takes differs between verbs.
    """
    tags = {"shard": str(shard), "replica": str(replica)}
    keys = tuple(tags)
    layers = Counter("shardprune_layers_done", "Layers that were solved and written", keys)
    waves = Counter("shardprune_waves", "Waves that a worker is done with, by what it did", (*keys, "verb"))
    moved = Counter("shardprune_bytes_moved", "Bytes of tensors that came from other processes", keys)
    solving = Histogram("shardprune_solver_seconds", "Seconds to solve one input", SOLVER_SECONDS, keys)
    for metric in (layers, waves, moved, solving):
        metric.set_default_tags(tags)

    def watch(verb: str, kind: Kind, seconds: float, received: int) -> None:
        if received:
            moved.inc(received)
        if kind in OF_ONE_WAVE:
            waves.inc(tags={"verb": verb})
        if verb == PruneWorker.written.__name__:  # `write` has only begun a file
            layers.inc()
        if verb == PruneWorker.solve.__name__:  # other verbs of its kind solve no single input
            solving.observe(seconds)

    return watch
