"""Runs over multimodal models: the language tower is pruned, and all else is what it was."""

import json
import shutil
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoModelForImageTextToText

from shardprune.model.checkpoint import Checkpoint
from shardprune.model.empty_model import attention_of
from shardprune.model.skeleton import Skeleton
from tests.support.architectures import CARRYING, make_architecture
from tests.support.running import run
from tests.support.tiny import differing, load_tensors, make_tokens
from tests.support.towers import OF_TIMM, TOWERS, make_tower


@torch.no_grad()
def perplexity(path, tokens):
    """The perplexity of the whole model on text, in which transformers finds every tensor and no other."""
    attention = attention_of(Checkpoint(str(path)).config)
    model, loading = AutoModelForImageTextToText.from_pretrained(
        path, output_loading_info=True, attn_implementation=attention
    )
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    logits = model.eval()(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits[:, :-1]
    return float(cross_entropy(logits.flatten(0, 1).double(), tokens[:, 1:].flatten()).exp())


timm = pytest.mark.skipif(find_spec("timm") is None, reason="needs timm, which needs torchvision")


@pytest.mark.parametrize("model_type", [*TOWERS, *(pytest.param(one, marks=timm) for one in OF_TIMM)])
def test_the_language_tower_alone_is_pruned(model_type, tmp_path):
    dense = make_tower(tmp_path / "model", model_type)
    words = np.random.default_rng(0).integers(0, 60, (12, 24))  # none that stands for an image
    np.save(tmp_path / "tokens.npy", words)
    tokens, text = torch.from_numpy(words), str(tmp_path / "tokens.npy")
    result = run(tmp_path, "out", eval=(text,), sparsity=0.5, shards=2)
    (measured,) = result.perplexity.values()
    assert measured.before == pytest.approx(perplexity(dense, tokens), rel=1e-4)
    assert measured.after == pytest.approx(perplexity(tmp_path / "out", tokens), rel=1e-4)
    assert measured.after != pytest.approx(measured.before, rel=1e-3)

    checkpoint = Checkpoint(dense)
    skeleton = Skeleton(checkpoint.config, "cpu")
    pruned = {
        checkpoint.stored_name(skeleton.projection_tensor(one.layer, one.name)) for one in result.sparsity.projections
    }
    before, after = load_tensors(dense), load_tensors(tmp_path / "out")
    assert before.keys() == after.keys()
    assert {name for name in before if not torch.equal(before[name], after[name])} == pruned
    zeros, weights = (
        sum(count(after[name]) for name in pruned) for count in (lambda t: int((t == 0).sum()), torch.numel)
    )
    assert zeros / weights == result.sparsity.achieved == pytest.approx(0.5, abs=1e-3)


@pytest.mark.parametrize("model_type", ["gemma3", "mllama", "qwen2_5_vl", "qwen3_5_moe", "qwen3_vl_moe"])
def test_layouts_and_shards_make_no_difference(model_type, tmp_path):
    make_tokens(tmp_path / "tokens.npy")
    make_tower(tmp_path / "first", model_type)
    make_tower(tmp_path / "second", model_type, save_original_format=False)
    run(tmp_path, "single", "first", pattern="2:4")
    run(tmp_path, "sharded", "first", pattern="2:4", shards=2, weights="streamed")
    assert differing(tmp_path / "single", tmp_path / "sharded") == []
    run(tmp_path, "other", "second", pattern="2:4")
    found = [Checkpoint(str(tmp_path / name)) for name in ("single", "other")]
    config = found[0].config
    for name in Skeleton(config, "cpu").tensors():
        assert torch.equal(found[0].read(name), found[1].read(name)), name


def test_a_config_with_all_fields_side_by_side_is_read_as_transformers_reads_it(tmp_path):
    make_tokens(tmp_path / "tokens.npy")
    path = make_tower(tmp_path / "model", "qwen2_5_vl")
    run(tmp_path, "out", pattern="2:4")
    config = tmp_path / "model" / "config.json"
    raw = json.loads(config.read_text())
    text = raw.pop("text_config")
    raw["vision_config"]["model_type"] = raw["model_type"]
    config.write_text(json.dumps({**text, **raw}))
    assert Checkpoint(path).config.model_type == "qwen2_5_vl_text"
    run(tmp_path, "flat", pattern="2:4")
    assert differing(tmp_path / "out", tmp_path / "flat") == []
    assert json.loads((tmp_path / "flat" / "config.json").read_text()) == {**text, **raw}


def test_experts_that_lie_transposed_in_the_files_stay_so(tmp_path):
    tokens = torch.from_numpy(np.load(make_tokens(tmp_path / "tokens.npy")))
    make_tower(tmp_path / "model", "qwen3_vl_moe")
    shutil.copytree(tmp_path / "model", tmp_path / "other")
    (file,) = (tmp_path / "other").glob("*.safetensors")
    stored = load_file(file)
    turned = {name: t.transpose(1, 2).contiguous() if ".experts." in name else t for name, t in stored.items()}
    save_file(turned, file, {"format": "pt"})
    run(tmp_path, "out", pattern="2:4")
    run(tmp_path, "other-out", "other", pattern="2:4")
    after = load_tensors(tmp_path / "other-out")
    assert {name: tensor.shape for name, tensor in after.items()} == {name: t.shape for name, t in turned.items()}
    straight = {name: t.transpose(1, 2) if ".experts." in name else t for name, t in after.items()}
    expected = load_tensors(tmp_path / "out")
    assert [name for name in expected if not torch.equal(expected[name], straight[name])] == []
    assert perplexity(tmp_path / "out", tokens) == perplexity(tmp_path / "other-out", tokens)


def test_the_tower_of_gemma_3n_is_the_text_model_of_that_name(tmp_path):
    make_tokens(tmp_path / "tokens.npy")
    make_architecture(tmp_path / "text", "gemma3n_text", CARRYING["gemma3n_text"])
    text = load_tensors(tmp_path / "text")
    whole = {name.replace("model.", "model.language_model.", 1): tensor for name, tensor in text.items()}
    whole["model.vision_tower.timm_model.conv.weight"] = torch.ones(2, 2)
    config = AutoConfig.for_model("gemma3n", text_config={**CARRYING["gemma3n_text"], "model_type": "gemma3n_text"})
    config.save_pretrained(tmp_path / "whole")
    save_file(whole, tmp_path / "whole" / "model.safetensors", {"format": "pt"})
    for name in ("text", "whole"):
        run(tmp_path, f"{name}-out", name, pattern="2:4")
    after = load_tensors(tmp_path / "whole-out")
    assert after.keys() == whole.keys()
    assert torch.equal(after.pop("model.vision_tower.timm_model.conv.weight"), torch.ones(2, 2))
    for name, tensor in load_tensors(tmp_path / "text-out").items():
        assert torch.equal(after[name.replace("model.", "model.language_model.", 1)], tensor), name
