"""The memory of the object store: a plan counts what a run asks for."""

import pytest

from shardprune import Recipe
from shardprune.cluster import object_store
from shardprune.cluster.backends import backend_of
from shardprune.commands.prune import PruningRun, prepare_first
from shardprune.planning.choosing import choose
from shardprune.planning.memory import largest, node_bytes
from shardprune.planning.recipe import PlanRecipe
from shardprune.planning.workload import read_model
from shardprune.report.clock import Clock
from shardprune.report.progress import Reporter
from tests.support.tiny import make_model

FIELDS = {
    "own": {},
    "stream": {"targets": "stream"},
    "damping auto": {"damping": "auto"},
    "fisher": {"allocation": "fisher"},
    "trained": {"reconstruct": 5},
    "wanda": {"method": "wanda"},
}


@pytest.mark.parametrize("fields", FIELDS.values(), ids=FIELDS)
def test_a_plan_has_the_object_store_of_the_run(fields, tmp_path, monkeypatch):
    monkeypatch.setattr(object_store, "MIN_STORE_BYTES", 0)
    make_model(tmp_path / "model", "llama-3.1")
    shared = {"model": str(tmp_path / "model"), "sparsity": 0.5, "calibration": "self", "samples": 32, "seqlen": 16}
    shared |= {"shards": 2, "replicas": 4, "exchange": "store", "targets": "own", **fields}
    recipe = Recipe.checked({**shared, "out": str(tmp_path / "o"), "backend": "ray", "device": "cpu"})
    backend = backend_of(recipe)
    run = PruningRun(prepare_first(recipe, backend), backend, Reporter(quiet=True), Clock(Reporter(quiet=True).events))
    planned = {**shared, "hardware": "cpu", "gpus": 8, "weights": "resident", "propagation": "exact"}
    chosen = choose(PlanRecipe.checked(planned), read_model(shared["model"]), "exact")
    task = chosen.tasks[-1]
    workers = largest(task, chosen.setup)[0].device.peak
    assert node_bytes(task, chosen.setup, 8) - 8 * workers == run.prepared.store_bytes(run._sent_bytes())
