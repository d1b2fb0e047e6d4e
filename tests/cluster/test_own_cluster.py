"""A cluster that a run starts for itself."""

import json
import os
import subprocess
import sys

import pytest

# A model writes its calibration text with a small object store, before what is pruned on it asks for a larger one.
STARTED = """
import json, ray, sys
from shardprune.cluster.ray_backend import RayBackend
from shardprune.evaluation.sharded import ShardedModel
from shardprune.recipes.evaluate import ShardFields
from shardprune.report.progress import Reporter
from shardprune.shard.forward_worker import ForwardWorker

MIB = 2**20
backend = RayBackend(None, 60.0)
model = ShardedModel(sys.argv[1], ShardFields(backend="ray", device="cpu", threads=1), backend, Reporter(quiet=True))
specs, stores = model._specs(), []
for size, kept in ((128, False), (200, True), (300, False), (150, False)):
    group = backend.start(specs, size * MIB, ForwardWorker)
    stores.append(int(ray.cluster_resources()["object_store_memory"]) // MIB)
    if not kept:
        group.close()
backend.close()
print(json.dumps([stores, ray.is_initialized()]))
"""


@pytest.mark.long
def test_its_object_store_is_as_large_as_the_largest_that_is_asked_for_while_nothing_runs(tmp_path):
    from tests.support.tiny import make_model

    make_model(tmp_path / "model", "llama-3.1")
    environment = {**os.environ, "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
    command = [sys.executable, "-c", STARTED, str(tmp_path / "model")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == [[128, 200, 200, 200], False]
