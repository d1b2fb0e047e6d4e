"""Every family of models is trained and written as an ordinary checkpoint, in whatever dtype it was stored."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, LlavaForConditionalGeneration

from tests.recovery.trainings import furthest, losses, make_sparse, same_zeros, train
from tests.support.tiny import CONFIGS, LLAVA_LAYOUTS, VOCABULARY, load_tensors, make_llava, make_tokens

WAYS = {"full": {"full": True}, "low-rank": {"lora_rank": 4}}
LOW_RANK = ("llama", "phi3", "opt", "qwen2")
TWO_STEPS = {"steps": 2, "keep_sparsity": True, "data": "tokens.npy", "length": 12}


@pytest.fixture(scope="module")
def models(folder, tmp_path_factory):
    """Sparse models by family and dtype, each made once."""
    made = tmp_path_factory.mktemp("models")
    make_tokens(made / "tokens.npy", 20, 12)

    def get(family, dtype=torch.float32):
        name = f"{family}-{str(dtype).removeprefix('torch.')}"
        if not (made / name).exists():
            make_sparse(made / name, family, dtype=dtype)
        return {**TWO_STEPS, "model": str(made / name), "data": str(made / "tokens.npy")}

    return get


def loads(out, **options):
    model, report = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True, **options)
    assert not any(report.values()), report
    return model


# What low-rank updates are of differs where projections do: fused ones, and biases.
@pytest.mark.parametrize(
    ("family", "way"),
    [
        pytest.param(family, way, marks=[pytest.mark.long] if way == "low-rank" and family not in LOW_RANK else [])
        for family in CONFIGS
        for way in WAYS
    ],
)
def test_a_family_is_trained(folder, models, family, way, tmp_path):
    fields = models(family)
    result = train(folder, tmp_path / "o", **fields, **WAYS[way])
    loads(tmp_path / "o")
    before, after = load_tensors(fields["model"]), load_tensors(tmp_path / "o")
    assert {name: tensor.shape for name, tensor in before.items()} == {n: t.shape for n, t in after.items()}
    assert furthest(before, after) > 1e-6
    assert same_zeros(fields["model"], tmp_path / "o")
    assert result.sparsity.achieved == result.sparsity.before > 0.4
    trained = sum(tensor.numel() for tensor in before.values()) if way == "full" else None
    assert trained in (None, result.recovery.parameters_trained)


def test_tied_embeddings_stay_tied(folder, models, pair, tmp_path):
    fields = models("llama-grouped-tied") | {"full": True}
    result = train(folder, tmp_path / "o", pair, zero=3, **fields)
    alone = train(folder, tmp_path / "alone", zero=0, **fields)
    assert losses(result) == pytest.approx(losses(alone), abs=1e-5)
    assert "lm_head.weight" not in load_tensors(tmp_path / "o")
    model = loads(tmp_path / "o")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert furthest(tmp_path / "o", tmp_path / "alone") < 1e-5
    moved = load_tensors(tmp_path / "o")["model.embed_tokens.weight"]
    assert not torch.equal(moved, load_tensors(fields["model"])["model.embed_tokens.weight"])


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("stored", "precision", "zero"),
    [(torch.bfloat16, "fp32", 1), (torch.float32, "bf16", 1), (torch.bfloat16, "bf16", 3)],
)
def test_the_stored_dtype_stays(folder, models, way, stored, precision, zero, tmp_path):
    fields = models("llama", stored)
    result = train(folder, tmp_path / "o", precision=precision, zero=zero, **fields, **WAYS[way])
    after = load_tensors(tmp_path / "o")
    assert {tensor.dtype for tensor in after.values()} == {stored}
    assert loads(tmp_path / "o", dtype="auto").dtype == stored
    assert result.recovery.losses[0].loss == pytest.approx(4.157, abs=0.005)  # the same of all
    assert result.recovery.zeros_kept == result.recovery.zeros_before


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("prefix", LLAVA_LAYOUTS)
def test_only_the_language_tower_of_a_llava_is_trained(folder, models, prefix, way, tmp_path):
    make_llava(tmp_path / "llava", **LLAVA_LAYOUTS[prefix])
    fields = models("llama") | {"model": str(tmp_path / "llava"), "keep_sparsity": False}
    train(folder, tmp_path / "o", **fields, **WAYS[way])
    before, after = load_tensors(tmp_path / "llava"), load_tensors(tmp_path / "o")
    assert before.keys() == after.keys()
    for name, tensor in after.items():
        projection = name.startswith(f"{prefix}layers.") and "_proj" in name
        language = name.startswith(prefix) or "lm_head" in name
        assert torch.equal(tensor, before[name]) != (language if way == "full" else projection), name
    assert (tmp_path / "o" / "config.json").read_bytes() == (tmp_path / "llava" / "config.json").read_bytes()
    model, report = LlavaForConditionalGeneration.from_pretrained(tmp_path / "o", output_loading_info=True)
    assert not any(report.values()), report
    assert model.config.text_config.vocab_size == VOCABULARY
    assert json.loads((tmp_path / "o" / "result.json").read_text())["command"] == "recover"
