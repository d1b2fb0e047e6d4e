"""Metrics of a worker against the calls that its ledger enters."""

import pytest

from shardprune.cluster import ray_metrics
from shardprune.shard.ledger import Ledger
from shardprune.shard.mop_worker import MopWorker
from shardprune.shard.prune_worker import PruneWorker
from shardprune.shard.verbs import kind_of, verbs_of


class Recorded:
    """Stands where Ray's counters and histograms stand."""

    def __init__(self, name, _text, *_more):
        self.name, self.calls = name, []
        MADE[name] = self

    def set_default_tags(self, tags):
        self.tags = tags

    def inc(self, value=1.0, tags=None):
        self.calls.append((value, tags))

    observe = inc


MADE: dict[str, Recorded] = {}


@pytest.fixture
def ledger(monkeypatch):
    """A worker's ledger, whose calls become metrics."""
    monkeypatch.setattr(ray_metrics, "Counter", Recorded)
    monkeypatch.setattr(ray_metrics, "Histogram", Recorded)
    ledger = Ledger()
    ledger.watcher = ray_metrics.metrics(1, 0)
    return ledger


def test_every_wave_counts_by_its_verb(ledger):
    verbs = {**verbs_of(PruneWorker), **verbs_of(MopWorker)}
    for name, method in verbs.items():
        ledger.add(name, kind_of(method), None, 0.5, 0)
    counted = [tags["verb"] for _, tags in MADE["shardprune_waves"].calls]
    assert {"log_likelihoods", "judge", "losses", "compare", "run", "forward", "propagate"} <= set(counted)
    assert {"put", "take", "solve", "write", "load"}.isdisjoint(counted)
    assert len(counted) == len(set(counted))


def test_layers_solves_and_bytes_count(ledger):
    for name, received in (("solve", 8), ("rebuild", 0), ("write", 0), ("written", 0), ("put", 4)):
        ledger.add(name, kind_of(getattr(PruneWorker, name)), 2, 0.5, received)
    found = {name: [value for value, _ in metric.calls] for name, metric in MADE.items()}
    assert found["shardprune_solver_seconds"] == [0.5]
    assert found["shardprune_layers_done"] == [1.0]
    assert found["shardprune_bytes_moved"] == [8, 4]
    assert MADE["shardprune_waves"].tags == {"shard": "1", "replica": "0"}
