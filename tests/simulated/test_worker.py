"""What a worker asks of a GPU for one layer, and how it ends where the GPU is too small or fails."""

from dataclasses import replace

import pytest
import torch

from benchmarks.launches import at_size, count_layer, law, layer
from shardprune.errors import OutOfMemory, WorkerLost
from shardprune.model.pruning_job import PruningJob, Zeroing
from shardprune.shard.device_room import memory_for
from shardprune.shard.prune_worker import PruneWorker
from shardprune.shard.spec import WorkerSettings, WorkerSpec
from shardprune.solvers.allocation.allocation import Share
from shardprune.solvers.pattern import parse_pattern
from tests.simulated.bounds import COLUMN, HIDDEN, ON_HOST, STEPS
from tests.support.simulated_cuda import H100_BYTES, needs_simulated_cuda, simulated_cuda
from tests.support.tiny import make_model

pytestmark = needs_simulated_cuda


def within(asked, bound) -> bool:
    launches, syncs, kilobytes = bound
    return asked.launches <= launches and asked.syncs <= syncs and asked.to_device + asked.to_host <= 1024 * kilobytes


def test_a_layer_asks_no_more_of_the_gpu_than_it_must():
    steps = count_layer(HIDDEN)
    assert steps.keys() == STEPS.keys()
    over = {label: asked for label, asked in steps.items() if not within(asked, STEPS[label])}
    assert not over


def test_alps_waits_for_the_gpu_once_for_an_input_and_for_each_count():
    """However many iterations: once at the first factor, then as every method for its findings."""
    for label, asked in count_layer(64, method="alps").items():
        if label.startswith("solve"):
            assert asked.syncs <= STEPS[label][1] - 1, label


def test_waves_on_the_host_come_and_go_once():
    steps = count_layer(HIDDEN, activations="host")
    over = {label: steps[label] for label, bound in ON_HOST.items() if not within(steps[label], bound)}
    assert not over


@pytest.mark.parametrize("pattern", COLUMN)
def test_launches_of_column_steps(pattern):
    small, large = (count_layer(hidden, pattern=pattern, error=False) for hidden in (64, 128))
    columns = 128 - 64
    assert (large["solve o"].launches - small["solve o"].launches) / columns <= COLUMN[pattern]


def test_the_planned_layer_is_that_of_llama_70b():
    """Operations, copies and launches of the full size, by the laws through two small ones, against their formulae."""
    small, large = (count_layer(hidden) for hidden in (128, 256))
    planned = layer(at_size(small, large, 128))
    tokens = 64 * 4096
    weights = {"attention": 2 * 8192**2 + 2 * 8192 * 1024, "mlp": 3 * 8192 * 28672}
    forward = 2 * tokens * (sum(weights.values()) + 2048 * 8192)

    def operations(label: str) -> float:
        sums = (sum(steps[label].arithmetic.values()) for steps in (small, large))
        return 64 * law(*sums, 128, 2, 8192, (2, 3))

    assert operations("propagate") == pytest.approx(forward, rel=0.02)
    assert planned["write"].to_host == pytest.approx(2 * sum(weights.values()), rel=0.01)
    assert planned["propagate"].launches == 64 * small["propagate"].launches
    assert planned["solve down"].launches <= COLUMN["unstructured"] * 28672


# -- memory and failures --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return make_model(tmp_path_factory.mktemp("worker") / "model")


def spec(model: str, out, **fields) -> WorkerSpec:
    zeroing = Zeroing("sparsegpt", parse_pattern("unstructured"), 0.5, "uniform", outlier_m=5.0, spread=0.08)
    settings = WorkerSettings(model, "cuda", "float32", 1, False, "auto")
    job = PruningJob(zeroing, None, None, measure_error=True)
    values = {"shard": 1, "replica": 2, "layers": range(4), "job": job, "widths": None, "finished": frozenset()}
    values |= {"settings": settings, "out": str(out), "fingerprint": "test", "activation_bytes": 0}
    return WorkerSpec(**{**values, **fields})


@pytest.mark.parametrize(
    ("waves", "others", "place"), [(1.0, 0.0, "device"), (0.5, 0.5, "device"), (0.5, 0.51, "host"), (1.01, 0, "host")]
)
def test_waves_stay_on_the_device_where_there_is_room_beside_all_else(model, tmp_path, waves, others, place):
    room = 10**9
    with simulated_cuda(memory=int(memory_for(room)) + 1):
        worker = PruneWorker(spec(model, tmp_path, activation_bytes=int(waves * room), other_bytes=int(others * room)))
        before = torch.cuda.memory_allocated()
        worker.put("s", 0, torch.zeros(1, 4, 32))
        assert torch.cuda.memory_allocated() - before == (512 if place == "device" else 0)
        assert worker.activations.get("s", 0).is_cuda


def test_too_little_memory_names_worker_layer_and_help(model, tmp_path):
    with simulated_cuda() as gpu:
        worker = PruneWorker(spec(model, tmp_path))
        worker.put("s", 0, torch.randn(2, 24, 32))
        worker.accumulate("s", 0, 0, False)
        gpu.memory = gpu.allocated + 1000
        with pytest.raises(OutOfMemory) as raised:
            worker.solve(0, 0, dict.fromkeys(worker.skeleton.family.kinds[0].inputs[0], Share(0.5)))
    told = str(raised.value)
    assert told.startswith("worker 1.2, layer 0, solve: its device is too small (CUDA out of memory. Tried to allocate")
    assert "\n" not in told
    assert all(option in told for option in ("--weights streamed", "--activations host", "--wave", "--shards"))


def test_too_little_memory_to_start_names_the_worker(model, tmp_path):
    with simulated_cuda(memory=16), pytest.raises(OutOfMemory, match=r"worker 1\.2, start: its device is too small"):
        PruneWorker(spec(model, tmp_path))


FAILURES = {
    "illegal access": (torch.AcceleratorError("CUDA error: an illegal memory access was encountered"), 700, WorkerLost),
    "context": (torch.AcceleratorError("CUDA error: out of memory"), 2, OutOfMemory),
    "library": (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"), None, OutOfMemory),
}


@pytest.mark.parametrize("name", FAILURES)
def test_errors_of_the_device_end_as_what_they_are(model, tmp_path, monkeypatch, name):
    error, code, expected = FAILURES[name]
    if code is not None:
        error.error_code = code

    def fails(*_):
        raise error

    with simulated_cuda():
        worker = PruneWorker(spec(model, tmp_path))
        worker.put("s", 0, torch.randn(2, 24, 32))
        monkeypatch.setattr(type(worker.skeleton), "forward_layer", fails)
        with pytest.raises(expected, match=r"worker 1\.2, layer 3, propagate: .*CUDA error"):
            worker.propagate("s", 0, 3, "latest", False)


def test_other_errors_stay_what_they_are(model, tmp_path, monkeypatch):
    def fails(*_):
        raise RuntimeError("a bug")

    with simulated_cuda():
        worker = PruneWorker(replace(spec(model, tmp_path), activation_bytes=H100_BYTES))
        worker.put("s", 0, torch.randn(2, 24, 32))
        monkeypatch.setattr(type(worker.skeleton), "forward_layer", fails)
        with pytest.raises(RuntimeError, match="^a bug$"):
            worker.propagate("s", 0, 3, "latest", False)
