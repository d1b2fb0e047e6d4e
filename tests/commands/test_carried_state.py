"""Runs over models whose layers pass more than hidden states on: several streams of them, an input of each layer's own,
keys and values of earlier layers, indices of chosen tokens."""

import re

import numpy as np
import pytest
import torch

from shardprune.errors import InputError
from shardprune.model.checkpoint import Checkpoint
from shardprune.model.skeleton import Skeleton
from tests.commands.test_architectures import matrices_left_dense, perplexity
from tests.support.architectures import CARRYING, make_architecture
from tests.support.running import run
from tests.support.tiny import differing, load_tensors, make_tokens


@pytest.fixture(scope="module", params=CARRYING)
def pruned(request, tmp_path_factory):
    """A model, and what a run with one shard has made of it."""
    folder = tmp_path_factory.mktemp(request.param)
    make_architecture(folder / "model", request.param, CARRYING[request.param])
    make_tokens(folder / "tokens.npy")
    return folder, run(folder, "out", eval=(str(folder / "tokens.npy"),), pattern="2:4")


def test_a_run_equals_transformers_before_and_after(pruned):
    folder, result = pruned
    tokens = torch.from_numpy(np.load(folder / "tokens.npy"))
    (measured,) = result.perplexity.values()
    assert measured.before == pytest.approx(perplexity(folder / "model", tokens), rel=1e-4)
    assert measured.after == pytest.approx(perplexity(folder / "out", tokens), rel=1e-4)
    assert measured.after != pytest.approx(measured.before, rel=1e-3)

    before, after = load_tensors(folder / "model"), load_tensors(folder / "out")
    kept = matrices_left_dense(str(folder / "model"))
    matrices = {name for name, tensor in before.items() if tensor.dim() == 2 and re.search(r"\.layers\.\d+\.", name)}
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == matrices - kept
    assert len(result.sparsity.projections) == len(changed)
    zeros, weights = (
        sum(count(after[name]) for name in changed) for count in (lambda t: int((t == 0).sum()), torch.numel)
    )
    assert zeros / weights == result.sparsity.achieved == 0.5


def test_what_is_passed_on_crosses_shards_and_streamed_layers(pruned):
    folder, _ = pruned
    run(folder, "sharded", pattern="2:4", shards=3, weights="streamed", wave=5)
    run(folder, "whole", pattern="2:4", wave=5)
    assert differing(folder / "whole", folder / "sharded") == []


def test_masks_are_rebuilt_and_kept_weights_refitted(pruned):
    folder, _ = pruned
    rebuilding = {"rebuild": "barber", "rebuild_threshold": 0.5, "keep_corrected": True, "refit": True}
    result = run(folder, "rebuilt", pattern="2:4", **rebuilding)
    blocks = [(one.layer, one.block) for one in result.sparsity.blocks]
    beside = {
        "gemma3n_text": ["laurel", "attention", "mlp", "per_layer"],
        "gemma4_text": ["attention", "mlp", "per_layer"],
        "glm_moe_dsa": ["attention", "mlp"],
    }
    assert [block for layer, block in blocks if layer == 1] == beside[(folder / "model").parent.name[:-1]]
    assert all(0 < one.error_after < 1 and one.swaps for one in result.sparsity.blocks)
    run(folder, "rebuilt-sharded", pattern="2:4", **rebuilding, shards=2)
    assert differing(folder / "rebuilt", folder / "rebuilt-sharded") == []


def test_kept_weights_learn_from_the_hidden_states_alone(pruned):
    folder, _ = pruned
    for name, shards in (("trained", 1), ("trained-sharded", 2)):
        run(folder, name, pattern="2:4", reconstruct=1, shards=shards)
    assert differing(folder / "trained", folder / "trained-sharded") == []
    assert differing(folder / "trained", folder / "out")


def test_a_text_of_its_own_is_refused_in_one_line(pruned):
    folder, _ = pruned
    with pytest.raises(InputError, match=r"^calibration: 'self' is not possible: "):
        run(folder, "own", pattern="2:4", calibration="self")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("model_type", CARRYING)
def test_waves_keep_every_bit_of_what_they_carry(model_type, dtype, tmp_path):
    skeleton = Skeleton(Checkpoint(make_architecture(tmp_path, model_type, CARRYING[model_type])).config, "cpu", dtype)
    carried, generator = skeleton.family.carried, torch.Generator().manual_seed(0)

    def drawn(*shape):
        return torch.randn(shape, generator=generator).to(dtype)

    hidden = drawn(*[carried.streams] * bool(carried.streams), 2, 24, carried.hidden)
    own = [drawn(2, 24, carried.own) for _ in range(skeleton.layers)] if carried.own else []
    wave = carried.wave(hidden, own)
    assert wave.shape == (2, 24, skeleton.wave_columns(24))
    shared = {
        name: (drawn(2, heads, 24, width), drawn(2, heads, 24, width))
        for name, (heads, width) in carried.shared.items()
    }
    indices = torch.randint(0, 200_000, (2, 24, carried.chosen), generator=generator)
    output = (hidden + 1, indices) if carried.chosen else hidden + 1
    image = carried.leaving(wave, output, {"shared_kv_states": shared})
    assert image.shape == wave.shape
    assert torch.equal(carried.hidden_states(image), hidden + 1)
    arguments = carried.entering(image, 1, {})
    assert not own or torch.equal(arguments["per_layer_input"], own[1])
    for name, states in shared.items():
        assert all(map(torch.equal, arguments["shared_kv_states"][name], states))
    assert not carried.chosen or torch.equal(arguments["prev_topk_indices"], indices)
