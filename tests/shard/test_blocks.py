"""Blocks of a layer against the whole layer run with and without the pruned weights."""

import copy

import pytest
import torch

from shardprune.errors import SolverError
from shardprune.model.checkpoint import Checkpoint
from shardprune.model.skeleton import Skeleton, projection_weight
from shardprune.shard.blocks import Block, SquaredGradients
from shardprune.solvers.pattern import Unstructured
from shardprune.solvers.rebuilding import Rebuilding
from tests.support.tiny import CONFIGS, make_model

LAYER = 1


@pytest.fixture(scope="module", params=CONFIGS)
def layer(request, tmp_path_factory):
    """A dense layer of a family, the same layer pruned, its skeleton and some activations."""
    folder = tmp_path_factory.mktemp("blocks")
    checkpoint = Checkpoint(make_model(folder / "model", request.param))
    skeleton = Skeleton(checkpoint.config, "cpu", torch.float32)
    skeleton.load_frame(checkpoint)
    names = skeleton.layer_tensors(LAYER)
    dense = skeleton.build_layer(LAYER, [(name, checkpoint.read(name)) for name in names])
    sparse = copy.deepcopy(dense)
    for name in skeleton.family.kinds[0].projections:
        weight = projection_weight(sparse, name)
        weight[weight.abs() < weight.abs().median()] = 0
    hidden = torch.randn(3, 12, skeleton.config.hidden_size, generator=torch.Generator().manual_seed(0))
    return skeleton, dense, sparse, hidden


def outputs(layer, skeleton, hidden) -> dict[str, torch.Tensor]:
    """What the last projection of the attention and of the MLP puts out, for one sequence."""
    seen = {}
    hooks = [
        layer.get_submodule(names[-1]).register_forward_hook(
            lambda _m, _i, output, label=label: seen.update({label: output})
        )
        for label, names in skeleton.family.kinds[0].blocks.items()
    ]
    skeleton.forward_layer(layer, hidden, skeleton.layer_arguments(LAYER, *hidden.shape[:2]))
    for hook in hooks:
        hook.remove()
    return seen


def plain(skeleton, dense, sparse, hidden, label, names):
    """Squared gradients and errors of a block: dense weights in the block, sparse ones in the other."""
    squares = {name: torch.zeros_like(projection_weight(dense, name)) for name in names}
    lost = norm = 0.0
    for sequence in hidden.split(1):
        with torch.no_grad():
            target = outputs(sparse, skeleton, sequence)[label]
        trial = copy.deepcopy(sparse)
        for name in names:
            projection_weight(trial, name).copy_(projection_weight(dense, name))
            projection_weight(trial, name).requires_grad_(True)
        found = outputs(trial, skeleton, sequence)[label]
        error = (found - target).square().sum()
        error.backward()
        for name in names:
            squares[name] += projection_weight(trial, name).grad ** 2
        lost, norm = lost + float(error.detach()), norm + float(found.detach().square().sum())
    return squares, lost, norm


@pytest.mark.parametrize("label", ["attention", "mlp"])
def test_gradients_and_errors_are_those_of_the_whole_layer(layer, label):
    skeleton, dense, sparse, hidden = layer
    names = skeleton.family.kinds[0].blocks[label]
    block = Block(sparse, {name: projection_weight(dense, name) for name in names})
    arguments = skeleton.layer_arguments(LAYER, 1, hidden.shape[1])
    squares, lost, norm = plain(skeleton, dense, sparse, hidden, label, names)

    assert block.compare(hidden, arguments, None) == pytest.approx((lost, norm), rel=1e-4)
    sums, others = SquaredGradients(block.dense), SquaredGradients(block.dense)
    first = block.compare(hidden[:2], arguments, sums)
    second = block.compare(hidden[2:], arguments, others)
    assert (first[0] + second[0], first[1] + second[1]) == pytest.approx((lost, norm), rel=1e-4)
    sums.merge([None, others.part()])
    assert sums.samples == 3
    assert sums.squares.keys() == squares.keys()
    for name, square in squares.items():
        assert torch.allclose(sums.squares[name], square, rtol=1e-3, atol=1e-6 * float(square.max())), name
        assert torch.equal(sums.mean(name, "layer"), sums.squares[name] / 3)
        assert bool(square.any())


@pytest.mark.parametrize(("dtype", "agreement"), [(torch.bfloat16, 0.9), (torch.float16, 0.995)])
def test_small_errors_beside_a_large_residual_keep_their_gradients(dtype, agreement, device, tmp_path):
    """Scores in 16 bit choose the weights that float64 would: neither the residual stream nor float16's narrow
    range may swallow what the blocks lose."""
    checkpoint = Checkpoint(make_model(tmp_path / "model", "llama"))
    skeletons = {kind: Skeleton(checkpoint.config, device, kind) for kind in (dtype, torch.float64)}
    found = {}
    for kind, skeleton in skeletons.items():
        skeleton.load_frame(checkpoint)
        tensors = [(name, checkpoint.read(name).to(dtype)) for name in skeleton.layer_tensors(LAYER)]
        dense = skeleton.build_layer(LAYER, tensors)
        for name in skeleton.family.kinds[0].projections:
            if name.endswith(("o_proj", "down_proj")):
                projection_weight(dense, name).mul_(2**-8)
        sparse = copy.deepcopy(dense)
        for name in skeleton.family.kinds[0].projections:
            weight = projection_weight(sparse, name)
            weight[weight.abs() < 0.1 * weight.abs().median()] = 0
        hidden = 8 * torch.randn(2, 48, skeleton.config.hidden_size, generator=torch.Generator().manual_seed(0))
        arguments = skeleton.layer_arguments(LAYER, 1, hidden.shape[1])
        for names in skeleton.family.kinds[0].blocks.values():
            block = Block(sparse, {name: projection_weight(dense, name) for name in names})
            with torch.no_grad():  # as a worker's verbs are
                squares = SquaredGradients(block.dense)
                lost, _ = block.compare(hidden.to(device, dtype).to(kind), arguments, squares)
            for name in names:
                found.setdefault(name, []).append((lost, squares.squares[name].double().sqrt().flatten().cpu()))
    for name, ((lost, roots), (exact_lost, exact)) in found.items():
        assert lost == pytest.approx(exact_lost, rel=0.2), name
        assert float(torch.corrcoef(torch.stack([roots, exact]))[0, 1]) > agreement, name
        assert float((roots == 0).double().mean()) <= float((exact == 0).double().mean()) + 0.01, name


def test_all_projections_belong_to_one_block(layer):
    skeleton = layer[0]
    attention, mlp = skeleton.family.kinds[0].blocks.values()
    assert attention
    assert mlp
    assert set(attention) | set(mlp) == set(skeleton.family.kinds[0].projections)
    assert not set(attention) & set(mlp)


def test_gradients_that_overflow_name_the_projection(layer):
    skeleton, dense, sparse, _ = layer
    name = skeleton.family.kinds[0].blocks["attention"][0]
    block = Block(sparse, {name: projection_weight(dense, name)})
    squares = SquaredGradients(block.dense)
    squares.add([torch.full_like(projection_weight(dense, name), float("inf"))], 1.0)
    with pytest.raises(SolverError, match=rf"layer 1 {name}: its gradients are not finite"):
        block.rebuild(Rebuilding(0.1, "row", "weight-gradient", False), {name: Unstructured()}, squares, "layer 1")
