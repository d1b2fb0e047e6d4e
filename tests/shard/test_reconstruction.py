"""The training of a layer on one worker, against Adam written down."""

import copy
from dataclasses import replace

import pytest
import torch

from shardprune.model.pruning_job import PruningJob, Zeroing
from shardprune.model.skeleton import projection_weight
from shardprune.shard import forward_worker
from shardprune.shard.forward_worker import dense_stream
from shardprune.shard.master_weights import MasterWeights
from shardprune.shard.prune_worker import PruneWorker
from shardprune.shard.spec import WorkerSettings, WorkerSpec
from shardprune.solvers.pattern import parse_pattern
from shardprune.solvers.training import RATE, rate_at
from tests.support.tiny import make_model

STEPS = 12


def worker_of(folder, family, dtype=torch.float32) -> PruneWorker:
    zeroing = Zeroing("magnitude", parse_pattern("unstructured"), 0.5, "uniform", outlier_m=5.0, spread=0.08)
    settings = WorkerSettings(make_model(folder / "model", family, dtype), "cpu", "float32", 1, False, "auto")
    job = PruningJob(zeroing, None, None, measure_error=True)
    values = {"shard": 0, "replica": 0, "layers": range(4), "job": job, "widths": None, "finished": frozenset()}
    values |= {"settings": settings, "out": str(folder / "o"), "fingerprint": "test", "activation_bytes": 0}
    return PruneWorker(WorkerSpec(**values))


@pytest.fixture(params=["llama-3.1", "gemma2", "opt"])
def pruned(request, tmp_path):
    """A worker whose layer 1 has half of its weights, the waves that it keeps, and the dense layer."""
    with torch.no_grad():
        worker = worker_of(tmp_path, request.param)
        layer = worker.layers.get(1, "dense")
        dense = copy.deepcopy(layer)
        for name in worker.skeleton.family.kinds[0].projections:
            weight = projection_weight(layer, name)
            weight[weight.abs() < weight.abs().median()] = 0
        hidden = torch.randn(6, 24, worker.skeleton.config.hidden_size, generator=torch.Generator().manual_seed(0))
        for wave in range(3):
            own = hidden[2 * wave : 2 * wave + 2]
            worker.put("s", wave, own)
            image = worker.skeleton.forward_layer(dense, own, worker.skeleton.layer_arguments(1, 2, 24))
            worker.put(dense_stream("s"), wave, image)
    return worker, layer, dense, hidden


def plain_adam(worker, layer, dense, hidden, batches, norm):
    """The kept weights in double precision after one step for each batch of windows."""
    skeleton, names = worker.skeleton, worker.skeleton.family.kinds[0].projections
    own, goal = copy.deepcopy(layer).double(), copy.deepcopy(dense).double()
    given = skeleton.layer_arguments(1, len(batches[0]), 24)
    keywords = {
        name: tuple(part.double() for part in value) if name == "position_embeddings" else value
        for name, value in given.keywords.items()
    }
    arguments = replace(given, keywords=keywords)
    weights = [projection_weight(own, name).requires_grad_() for name in names]
    kept = [weight.detach() != 0 for weight in weights]
    rates = [
        RATE * float(weight.detach()[mask].square().mean().sqrt()) for weight, mask in zip(weights, kept, strict=True)
    ]
    first, second = ([torch.zeros_like(weight) for weight in weights] for _ in range(2))
    for step, batch in enumerate(batches):
        inputs = hidden[batch].double()
        output, target = (skeleton.forward_layer(one, inputs, arguments) for one in (own, goal))
        loss = (output - target).square().sum() / (len(batch) * norm)
        gradients = torch.autograd.grad(loss, weights)
        for place, gradient in enumerate(gradients):
            gradient = gradient * kept[place]
            first[place] = 0.9 * first[place] + 0.1 * gradient
            second[place] = 0.95 * second[place] + 0.05 * gradient**2
            mean, size = first[place] / (1 - 0.9 ** (step + 1)), second[place] / (1 - 0.95 ** (step + 1))
            change = rates[place] * rate_at(step, len(batches)) * mean / (size.sqrt() + 1e-8)
            weights[place].data -= change
    return dict(zip(names, weights, strict=True))


@pytest.mark.parametrize("on_host", [False, True])
def test_training_is_adam_on_the_kept_weights(pruned, on_host, monkeypatch):
    worker, layer, dense, hidden = pruned
    monkeypatch.setattr(worker, "trains_on_host", lambda: on_host)
    names, norm = worker.skeleton.family.kinds[0].projections, 30.0
    before = {name: projection_weight(layer, name).clone() for name in names}
    drawn = [[(step + place) % 6 for place in range(4)] for step in range(STEPS)]
    expected = plain_adam(worker, layer, dense, hidden, drawn, norm)
    with torch.no_grad():
        lost = worker.miss("s", 0, 1)
    batches = [[("s", window // 2, window % 2) for window in batch] for batch in drawn]
    zeros = worker.reconstruct(1, batches, norm, worker.skeleton.family.kinds[1].projections)
    for name in names:
        weight = projection_weight(layer, name)
        assert torch.equal(weight == 0, before[name] == 0)
        assert zeros[name] == int((before[name] == 0).sum())
        change, plain = weight - before[name], expected[name].detach() - before[name]
        assert torch.linalg.norm(change - plain) < 2e-2 * torch.linalg.norm(plain), name
    with torch.no_grad():
        assert sum(worker.miss("s", 0, 1)) < 0.9 * sum(lost)
    assert not any(parameter.requires_grad for parameter in layer.parameters())


def test_weights_are_rounded_as_they_are_stored(tmp_path):
    with torch.no_grad():
        worker = worker_of(tmp_path, "llama-3.1", torch.bfloat16)
        layer = worker.layers.get(0, "dense")
        weight = projection_weight(layer, "mlp.down_proj")
        weight[:, ::2] = 0
        worker.put("s", 0, torch.randn(2, 24, 32, generator=torch.Generator().manual_seed(0)))
        worker.put(dense_stream("s"), 0, torch.randn(2, 24, 32, generator=torch.Generator().manual_seed(1)))
    worker.reconstruct(0, [[("s", 0, 0), ("s", 0, 1)]] * 3, 1.0, worker.skeleton.family.kinds[0].projections)
    assert torch.equal(weight, weight.bfloat16().float())
    assert torch.equal(weight[:, ::2], torch.zeros(32, 24))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_kept_on_the_host_between_steps_changes_no_bit(dtype):
    drawn = torch.Generator().manual_seed(0)
    dense = torch.randn(8, 6, generator=drawn)
    dense[dense.abs() < 0.5] = 0
    gradients = torch.randn(5, 8, 6, generator=drawn)
    found = []
    with torch.no_grad():
        for on_host in (False, True):
            weight = dense.to(dtype, copy=True)
            master = MasterWeights(weight, on_host)
            steps = []
            for gradient in gradients:
                master.step(gradient.clone(), 1e-2)
                steps.append(weight.clone())
            assert master.rounded(torch.bfloat16) == int((dense == 0).sum())
            found.append(torch.stack([*steps, weight]))
            # A layer in float32 is its own master.
            there = {"exp_avg", "exp_avg_sq"} | ({"master"} if dtype != torch.float32 else set())
            assert set(master._places) == (there if on_host else set())
    assert torch.equal(*found)
    assert not torch.equal(found[0][0], found[0][1])


@pytest.mark.parametrize(
    ("device", "kept", "room", "leaves"),
    [("cuda", False, 99, True), ("cuda", False, 100, False), ("cuda", True, 109, True), ("cuda", True, 110, False)],
)
def test_moments_leave_a_gpu_that_has_no_room_for_them(tmp_path, monkeypatch, device, kept, room, leaves):
    worker = worker_of(tmp_path, "llama-3.1")
    assert not worker.trains_on_host()  # on a CPU both are one
    monkeypatch.setattr(forward_worker, "memory_of", lambda _device: room)
    monkeypatch.setattr(forward_worker, "device_room", lambda memory: memory)
    worker.spec = replace(worker.spec, other_bytes=100, activation_bytes=10)
    worker.skeleton.device = torch.device(device)
    worker.activations.on_host = not kept
    assert worker.trains_on_host() == leaves
