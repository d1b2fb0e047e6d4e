"""Models whose layers are of several kinds are trained, each layer by the projections that it has."""

import pytest
from transformers import AutoModelForCausalLM

from tests.recovery.trainings import furthest, same_zeros, train
from tests.support.architectures import MIXED, make_architecture
from tests.support.running import run
from tests.support.tiny import load_tensors, make_tokens

WAYS = {"full": {"full": True}, "low-rank": {"lora_rank": 4}}


@pytest.fixture(scope="module")
def sparse(tmp_path_factory):
    """A pruned model with linear attention in one layer and attention in the other."""
    made = tmp_path_factory.mktemp("mixed")
    make_architecture(made / "model", "qwen3_5_text", MIXED["qwen3_5_text"])
    make_tokens(made / "tokens.npy", 20, 24)
    run(made, made / "sparse", sparsity=0.5, method="magnitude")
    return made


@pytest.mark.parametrize("way", WAYS)
def test_every_projection_is_trained_and_no_zero_is(folder, sparse, tmp_path, way):
    fields = {"model": str(sparse / "sparse"), "data": str(sparse / "tokens.npy"), "length": 24, "steps": 2}
    result = train(folder, tmp_path / "o", **fields, keep_sparsity=True, **WAYS[way])
    _, report = AutoModelForCausalLM.from_pretrained(tmp_path / "o", output_loading_info=True)
    assert not any(report.values()), report
    before, after = load_tensors(sparse / "sparse"), load_tensors(tmp_path / "o")
    assert furthest(before, after) > 1e-6
    assert same_zeros(sparse / "sparse", tmp_path / "o")
    names = {(entry.layer, entry.name) for entry in result.sparsity.projections}
    assert (0, "linear_attn.in_proj_qkv") in names
    assert (1, "self_attn.q_proj") in names
    assert len(names) == 7 + 7 - 1
    assert result.sparsity.achieved == pytest.approx(0.5, abs=2e-3)
