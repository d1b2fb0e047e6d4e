"""What a worker does, as metrics of its Ray node: Ray's dashboard and Prometheus take them from there."""

from ray.util.metrics import Counter, Histogram

from shardprune.shard.ledger import Watcher

WAVE_VERBS = frozenset({"embed", "forward", "run", "propagate", "accumulate", "gather", "compare", "losses"})
SOLVER_SECONDS = [0.01, 0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000]  # bounds of the histogram


def metrics(shard: int, replica: int) -> Watcher:
    """Metrics of one worker, which a ledger feeds; waves have the tag `verb`, by which what one takes differs."""
    tags = {"shard": str(shard), "replica": str(replica)}
    keys = tuple(tags)
    layers = Counter("shardprune_layers_done", "Layers that were solved and written", keys)
    waves = Counter("shardprune_waves", "Waves that a worker is done with, by what it did", (*keys, "verb"))
    moved = Counter("shardprune_bytes_moved", "Bytes of tensors that came from other processes", keys)
    solving = Histogram("shardprune_solver_seconds", "Seconds to solve one input", SOLVER_SECONDS, keys)
    for metric in (layers, waves, moved, solving):
        metric.set_default_tags(tags)

    def watch(verb: str, seconds: float, received: int) -> None:
        if received:
            moved.inc(received)
        if verb in WAVE_VERBS:
            waves.inc(tags={"verb": verb})
        elif verb == "solve":
            solving.observe(seconds)
        elif verb == "write":
            layers.inc()

    return watch
