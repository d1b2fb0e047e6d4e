"""GPUs that fail under real Ray actors: a dead context is a lost worker, too little memory is the end."""

import pytest
import torch

from shardprune.cluster import ray_backend
from shardprune.errors import OutOfMemory
from shardprune.report.progress import Reporter
from shardprune.shard.prune_worker import PruneWorker
from shardprune.shard.verbs import verb
from tests.support.running import run
from tests.support.tiny import differing


@pytest.fixture(scope="module")
def undisturbed(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed") / "o"
    run(folder, out, sparsity=0.5, threads=1)
    return out


def failing_actor(marker, error: type[RuntimeError], text: str) -> type:
    """A worker whose GPU fails once, in a layer's forward pass, and after that at every call, as a GPU does."""

    class PruneActor(ray_backend.PruneActor):
        broken = False

        @verb("propagate", layer="index")
        def propagate(self, stream, wave, index, version, observed):
            self._fail(index)
            super().propagate(stream, wave, index, version, observed)

        @verb("exchange")
        def take(self, stream, wave):
            self._fail()
            return super().take(stream, wave)

        def _fail(self, index=None):
            if index == 1 and not marker.exists():
                marker.touch()
                self.broken = True
            if self.broken:
                raise error(text)

    return PruneActor


@pytest.mark.long
@pytest.mark.parametrize("shards", [1, 2])
def test_a_worker_without_its_gpu_is_replaced(ray, folder, undisturbed, tmp_path, monkeypatch, shards):
    text = "CUDA error: an illegal memory access was encountered\nCUDA kernel errors might be reported later"
    actor = failing_actor(tmp_path / "failed", torch.AcceleratorError, text)
    monkeypatch.setitem(ray_backend.ACTORS, PruneWorker, actor)
    heard = []
    reporter = Reporter(quiet=True)
    monkeypatch.setattr(reporter, "say", heard.append)
    result = run(folder, tmp_path / "o", sparsity=0.5, threads=1, backend="ray", shards=shards, reporter=reporter)
    assert (tmp_path / "failed").exists()
    assert result.restarts == 1
    assert differing(undisturbed, tmp_path / "o") == []
    (line,) = (line for line in heard if "was lost" in line)
    assert line.startswith("a worker was lost (worker 0.0, ")
    assert "an illegal memory access was encountered" in line
    assert "\n" not in line


def test_too_little_memory_ends_the_run(ray, folder, tmp_path, monkeypatch):
    text = "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 79.11 GiB of which 8.19 GiB"
    actor = failing_actor(tmp_path / "failed", torch.OutOfMemoryError, text + " is free. Including other things")
    monkeypatch.setitem(ray_backend.ACTORS, PruneWorker, actor)
    with pytest.raises(OutOfMemory) as raised:
        run(folder, tmp_path / "o", sparsity=0.5, threads=1, backend="ray", shards=2)
    told = str(raised.value)
    assert told.startswith(f"worker 0.0, layer 1, propagate: its device is too small ({text} is free); ")
    assert "\n" not in told
    assert not (tmp_path / "o" / "result.json").exists()
