"""The statistics of experts on one worker, against sums over tokens that are routed by hand."""

import pytest
import torch
from torch.nn.functional import linear, silu
from transformers import AutoConfig

from shardprune.model.pruning_job import PruningJob, Zeroing
from shardprune.model.skeleton import Skeleton
from shardprune.shard.prune_worker import PruneWorker
from shardprune.shard.spec import WorkerSettings, WorkerSpec
from shardprune.solvers.pattern import parse_pattern
from tests.support.architectures import MIXTURES, make_architecture

EXPERTS, CHOSEN = 6, 2


def worker_of(folder, model_type: str = "qwen3_moe", **fields):
    path = make_architecture(folder / "model", model_type, MIXTURES[model_type])
    layers = Skeleton(AutoConfig.from_pretrained(path), "cpu").layers
    values = {"outlier_m": 5.0, "spread": 0.08, **fields}
    zeroing = Zeroing("sparsegpt", parse_pattern("unstructured"), 0.5, "uniform", **values)
    settings = WorkerSettings(path, "cpu", "float32", 1, False, "auto")
    job = PruningJob(zeroing, None, None, measure_error=False)
    values = {"shard": 0, "replica": 0, "layers": range(layers), "job": job, "widths": None, "finished": frozenset()}
    values |= {"settings": settings, "out": str(folder / "o"), "fingerprint": "test", "activation_bytes": 0}
    return PruneWorker(WorkerSpec(**values, samples=12))


@pytest.fixture
def worker(tmp_path):
    return worker_of(tmp_path)


@torch.no_grad()
def test_sums_are_those_of_routed_tokens_and_some_of_all(worker):
    """Six sequences here, of twelve on all replicas."""
    hidden = torch.randn(6, 24, 32, generator=torch.Generator().manual_seed(0))
    for wave in range(3):
        worker.put("s", wave, hidden[2 * wave : 2 * wave + 2])
        worker.accumulate("s", wave, 0, False)
    layer, seen = worker.layers.get(0, "dense"), []
    hook = layer.mlp.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0].flatten(0, 1)))
    worker.skeleton.forward_layer(layer, hidden, worker.skeleton.layer_arguments(0, 6, 24))
    hook.remove()
    (tokens,) = seen
    chosen = linear(tokens, layer.mlp.gate.weight).topk(CHOSEN, dim=-1).indices
    everything = tokens.T @ tokens
    for expert in range(EXPERTS):
        own = tokens[(chosen == expert).any(-1)]
        gate, up, _ = (
            layer.get_submodule(f"mlp.experts.{expert}.{name}") for name in ("gate_proj", "up_proj", "down_proj")
        )
        neurons = silu(linear(own, gate.weight)) * linear(own, up.weight)
        prior = 128 / (12 * 24) * everything
        for name, expected in (("gate_proj", own.T @ own + prior), ("down_proj", neurons.T @ neurons)):
            statistics = worker._input(
                0, worker.skeleton.family.kinds[0].input_names.index(f"mlp.experts.{expert}.{name}")
            )
            assert torch.allclose(statistics.gram, expected, rtol=1e-4, atol=1e-4)
            assert (statistics.samples, statistics.tokens) == (6, len(own))
    assert "mlp.experts" not in worker.sums[0]


@torch.no_grad()
def test_an_expert_without_tokens_counts_sequences(worker):
    layer = worker.layers.get(0, "dense")
    layer.mlp.gate.weight[4:] = 0
    layer.mlp.gate.weight[1], layer.mlp.gate.weight[3] = -layer.mlp.gate.weight[0], -layer.mlp.gate.weight[2]
    worker.put("s", 0, torch.randn(2, 24, 32, generator=torch.Generator().manual_seed(0)))
    worker.accumulate("s", 0, 0, False)
    statistics = worker.sums[0]["mlp.experts.5.down_proj"]
    assert (statistics.samples, statistics.tokens, bool(statistics.sums.any())) == (2, 0, False)


@torch.no_grad()
@pytest.mark.parametrize("model_type", [name for name in MIXTURES if name != "longcat_flash"])
def test_all_tokens_add_to_every_expert_and_change_no_output(tmp_path, model_type):
    """Every class's own code takes a router's answer that sends all tokens to one expert."""
    routed, worker = worker_of(tmp_path / "a", model_type), worker_of(tmp_path / "b", model_type, all_tokens=True)
    kinds = worker.skeleton.family.kinds
    index = next(layer for layer, kind in enumerate(kinds) if kind.mixtures)
    hidden = torch.randn(2, 24, 32, generator=torch.Generator().manual_seed(0))
    for one in (routed, worker):
        one.put("s", 0, hidden)
        one.accumulate("s", 0, index, True)
    assert torch.equal(routed.activations.get("s", 0), worker.activations.get("s", 0))
    for place, name in enumerate(kinds[index].input_names):
        all_tokens = worker._input(index, place)
        if kinds[index].mixture_of(name):
            assert all_tokens.tokens == 2 * 24
        else:
            assert torch.equal(all_tokens.gram, routed._input(index, place).gram)


@torch.no_grad()
def test_sums_over_all_tokens(tmp_path):
    worker = worker_of(tmp_path, all_tokens=True)
    hidden = torch.randn(6, 24, 32, generator=torch.Generator().manual_seed(0))
    for wave in range(3):
        worker.put("s", wave, hidden[2 * wave : 2 * wave + 2])
        worker.accumulate("s", wave, 0, False)
    layer, seen = worker.layers.get(0, "dense"), []
    hook = layer.mlp.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0].flatten(0, 1)))
    worker.skeleton.forward_layer(layer, hidden, worker.skeleton.layer_arguments(0, 6, 24))
    hook.remove()
    (tokens,) = seen
    for expert in range(EXPERTS):
        gate, up = (layer.get_submodule(f"mlp.experts.{expert}.{name}").weight for name in ("gate_proj", "up_proj"))
        neurons = silu(linear(tokens, gate)) * linear(tokens, up)
        place = worker.skeleton.family.kinds[0].input_names.index(f"mlp.experts.{expert}.down_proj")
        assert torch.allclose(worker._input(0, place).gram, neurons.T @ neurons, rtol=1e-4, atol=1e-4)
