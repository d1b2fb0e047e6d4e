"""Runs over architectures beyond the plain ones on a GPU, twice, and beside the CPU's."""

import pytest
import torch

from shardprune import ExpertsRecipe, experts
from shardprune.report.progress import Reporter
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
@pytest.mark.parametrize(
    ("model_type", "fields"), [*((name, {}) for name in CHOSEN), ("qwen3_moe", {"allocation": "fisher"})]
)
def test_experts_and_other_mixers_are_pruned_as_on_the_cpu(model_type, fields, tmp_path):
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    make_architecture(tmp_path / "model", model_type, CHOSEN[model_type])
    text = str(make_tokens(tmp_path / "tokens.npy"))
    measured = {}
    for out, device in (("first", "cuda"), ("second", "cuda"), ("here", "cpu")):
        result = run(tmp_path, out, sparsity=0.5, device=device, dtype="float32", eval=(text,), **fields)
        (measured[out],) = result.perplexity.values()
    assert differing(tmp_path / "first", tmp_path / "second") == []
    assert measured["first"].before == pytest.approx(measured["here"].before, rel=1e-4)
    assert measured["first"].after == pytest.approx(measured["here"].after, rel=NEAR)
    assert measured["first"].after != measured["first"].before


@pytest.mark.gpu
def test_the_experts_that_go_are_those_on_the_cpu(tmp_path):
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    make_architecture(tmp_path / "model", "qwen3_moe", CHOSEN["qwen3_moe"])
    values = {"model": str(tmp_path / "model"), "calibration": str(make_tokens(tmp_path / "tokens.npy")), "keep": 3}
    values |= {"samples": 12, "seqlen": 24, "backend": "local", "threads": 1, "dtype": "float32", "report": False}
    for device in ("cuda", "cpu"):
        recipe = ExpertsRecipe.checked({**values, "out": str(tmp_path / device), "device": device})
        experts(recipe, Reporter(quiet=True))
    assert differing(tmp_path / "cuda", tmp_path / "cpu") == []
