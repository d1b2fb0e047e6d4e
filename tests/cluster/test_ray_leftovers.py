"""Slots that nobody will use again, where Ray does not say whose they were."""

import logging

from shardprune.cluster import ray_leftovers


def test_a_ray_that_keeps_its_state_elsewhere_is_named_once(monkeypatch, caplog):
    def elsewhere():
        raise AttributeError("module 'ray._private.state' has no attribute 'state'")

    monkeypatch.setattr(ray_leftovers, "_left", elsewhere)
    with caplog.at_level(logging.WARNING):
        ray_leftovers.free_leftovers()
        ray_leftovers.free_leftovers()
    (record,) = caplog.records
    assert record.getMessage().endswith("AttributeError: module 'ray._private.state' has no attribute 'state'")
