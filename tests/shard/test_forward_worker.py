"""Waves that pass through the layers of a worker."""

import pytest
import torch

from shardprune.shard.forward_worker import ForwardWorker
from shardprune.shard.spec import ForwardSpec, WorkerSettings
from tests.support.tiny import CONFIGS, make_model


@pytest.fixture
def worker(tmp_path, request, device):
    settings = WorkerSettings(make_model(tmp_path / "model", request.param), device, "float32", 1, False, "device")
    return ForwardWorker(ForwardSpec(settings, shard=0, replica=0, layers=range(4), activation_bytes=0))


@pytest.mark.parametrize("worker", CONFIGS, indirect=True)
def test_sums_without_images_are_the_same_and_cost_no_product_after_the_last_input(worker):
    layer, last = worker.layers.get(0, "dense"), worker.skeleton.family.kinds[0].projections[-1]
    ran: list[str] = []
    for name in worker.skeleton.family.kinds[0].projections:
        layer.get_submodule(name).register_forward_hook(lambda *_, name=name: ran.append(name))
    hidden = torch.randn(3, 16, 32, generator=torch.Generator().manual_seed(0))
    for wave in range(2):
        worker.put("waves", wave, hidden * (wave + 1))
        worker.accumulate("waves", wave, 0, False)
    alone = worker.sums.pop(0)
    assert len(ran) == 2 * (len(worker.skeleton.family.kinds[0].projections) - 1)
    assert last not in ran
    kept = [worker.take("waves", wave) for wave in range(2)]
    assert torch.equal(kept[1], hidden * 2)

    for wave in range(2):
        worker.put("waves", wave, kept[wave])
        worker.accumulate("waves", wave, 0, True)
    assert ran.count(last) == 2
    assert set(alone) == set(worker.skeleton.family.kinds[0].input_names)
    for name, statistics in worker.sums[0].items():
        assert torch.equal(alone[name].sums, statistics.sums)
        assert alone[name].samples == statistics.samples == 6
    assert not any(module._forward_pre_hooks for module in layer.modules())
    assert not torch.equal(worker.take("waves", 1), kept[1])


@pytest.mark.parametrize("worker", ["llama"], indirect=True)
def test_pass_goes_on_until_every_input_has_been_seen(worker):
    """Whatever order a layer runs its projections in."""
    layer = worker.layers.get(0, "dense")
    hidden = torch.randn(2, 16, 32, generator=torch.Generator().manual_seed(0))
    worker.put("waves", 0, hidden)
    names = ("mlp.down_proj", "self_attn.q_proj")
    worker.sums[0] = {name: worker.empty_sums(0)[name] for name in names}  # the first comes last
    worker.accumulate("waves", 0, 0, False)
    seen = {}
    for name in names:
        layer.get_submodule(name).register_forward_pre_hook(
            lambda _module, inputs, name=name: seen.update({name: inputs[0].square().sum((0, 1))})
        )
    worker.propagate("waves", 0, 0, "dense", False)
    for name in names:
        assert torch.allclose(worker.sums[0][name].sums, seen[name])
