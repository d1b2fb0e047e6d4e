"""Runs over architectures beyond the plain ones on a GPU, twice, and beside the CPU's."""

import pytest
import torch

from tests.support.architectures import MIXED, MIXTURES, make_architecture
from tests.support.running import run
from tests.support.tiny import differing, make_tokens

NEAR = 1e-2  # of the perplexity: at near-ties sums in another order choose other zeros
CHOSEN = {
    name: table[name]
    for table, names in ((MIXTURES, ("qwen3_moe", "deepseek_v3")), (MIXED, ("qwen3_5_text", "jamba")))
    for name in names
}


@pytest.mark.gpu
@pytest.mark.parametrize("model_type", CHOSEN)
def test_experts_and_other_mixers_are_pruned_as_on_the_cpu(model_type, tmp_path):
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    make_architecture(tmp_path / "model", model_type, CHOSEN[model_type])
    text = str(make_tokens(tmp_path / "tokens.npy"))
    measured = {}
    for out, device in (("first", "cuda"), ("second", "cuda"), ("here", "cpu")):
        result = run(tmp_path, out, sparsity=0.5, device=device, dtype="float32", eval=(text,))
        (measured[out],) = result.perplexity.values()
    assert differing(tmp_path / "first", tmp_path / "second") == []
    assert measured["first"].before == pytest.approx(measured["here"].before, rel=1e-4)
    assert measured["first"].after == pytest.approx(measured["here"].after, rel=NEAR)
    assert measured["first"].after != measured["first"].before
