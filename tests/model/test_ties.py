"""Ties of embedding and head are what transformers makes of config and files, in every command that opens a model."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from shardprune.model.checkpoint import Checkpoint
from shardprune.recovery.model import load_model
from tests.conftest import SHARED
from tests.support.running import run, search_run
from tests.support.tiny import load_tensors, make_llava, make_model, make_tokens

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def change_config(model: Path, **fields) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").chmod(0o644)
    (model / "config.json").write_text(json.dumps({**config, **fields}))


def own_head(folder: Path, family: str = "llama") -> Path:
    """A model whose config ties its embeddings, and whose file holds a head of its own."""
    make_model(folder, family)
    tensors = load_file(folder / "model.safetensors")
    if HEAD not in tensors:
        embedding = next(name for name in tensors if name.endswith("embed_tokens.weight"))
        tensors[HEAD] = torch.randn(tensors[embedding].shape, generator=torch.Generator().manual_seed(3)) * 0.2
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    change_config(folder, tie_word_embeddings=True)
    return folder


def head_alone(folder: Path) -> Path:
    """A tied model that was saved under the head's name."""
    make_model(folder, "llama-grouped-tied")
    tensors = load_file(folder / "model.safetensors")
    tensors[HEAD] = tensors.pop(EMBEDDING)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def both_equal(folder: Path) -> Path:
    """A tied model that was saved under both names."""
    make_model(folder, "llama-grouped-tied")
    tensors = load_file(folder / "model.safetensors")
    tensors[HEAD] = tensors[EMBEDDING].clone()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@torch.no_grad()
def perplexity(model: str | Path, windows: torch.Tensor, auto=AutoModelForCausalLM) -> float:
    """Perplexity of a checkpoint as transformers loads it."""
    loaded = auto.from_pretrained(model, attn_implementation="sdpa").eval()
    losses = [loaded(window[None], labels=window[None]).loss.double() for window in windows]
    return float(torch.stack(losses).mean().exp())


@pytest.fixture(scope="module")
def windows(tmp_path_factory) -> tuple[Path, torch.Tensor]:
    """A folder with tokens for calibration, and the tokens."""
    folder = tmp_path_factory.mktemp("ties")
    return folder, torch.from_numpy(np.load(make_tokens(folder / "tokens.npy")))


LAYOUTS = {"own head": own_head, "head alone": head_alone, "both equal": both_equal}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_perplexity_before_and_after_is_that_of_transformers(layout, windows, tmp_path):
    folder, tokens = windows
    model, out = LAYOUTS[layout](tmp_path / "model"), tmp_path / "out"
    source = str(folder / "tokens.npy")
    measured = run(folder, out, model=model, sparsity=0.5, shards=2, eval=(source,)).perplexity[source]
    assert measured.before == pytest.approx(perplexity(model, tokens), rel=1e-6)
    assert measured.after == pytest.approx(perplexity(out, tokens), rel=1e-6)
    written, read = load_tensors(out), load_tensors(model)
    assert written.keys() == read.keys()
    assert all(torch.equal(written[name], read[name]) for name in (HEAD, EMBEDDING) if name in read)
    says = json.loads((out / "config.json").read_text())["tie_word_embeddings"]
    assert says == (layout != "own head")


def test_an_opt_with_a_head_of_its_own(windows, tmp_path):
    folder, tokens = windows
    model, source = own_head(tmp_path / "model", "opt-350m"), str(folder / "tokens.npy")
    measured = run(folder, tmp_path / "out", model=model, sparsity=0.5, eval=(source,)).perplexity[source]
    assert measured.before == pytest.approx(perplexity(model, tokens), rel=1e-6)
    assert measured.after == pytest.approx(perplexity(tmp_path / "out", tokens), rel=1e-6)


@pytest.mark.parametrize("command", ["structured", "mop"])
def test_a_head_of_its_own_stays_where_structures_go(command, windows, tmp_path):
    folder, tokens = windows
    model, out, source = own_head(tmp_path / "model"), tmp_path / "out", str(folder / "tokens.npy")
    if command == "mop":
        result = search_run(folder, out, model=model, remove=0.25, path="LG", eval=(source,))
    else:
        result = run(folder, out, model=model, sparsity=0.5, structured=0.2, eval=(source,))
    measured = result.perplexity[source]
    assert measured.before == pytest.approx(perplexity(model, tokens), rel=1e-6)
    assert measured.after == pytest.approx(perplexity(out, tokens), rel=1e-6)
    assert torch.equal(load_tensors(out)[HEAD], load_tensors(model)[HEAD])


def test_a_trained_model_has_the_head_that_its_file_holds(tmp_path):
    checkpoint = Checkpoint(str(own_head(tmp_path / "own")))
    model = load_model(checkpoint, torch.device("cpu"), torch.float32, None)
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    assert torch.equal(model.lm_head.weight, load_tensors(tmp_path / "own")[HEAD])
    for name in ("head alone", "both equal"):
        model = load_model(Checkpoint(str(LAYOUTS[name](tmp_path / name))), torch.device("cpu"), torch.float32, None)
        assert model.lm_head.weight is model.model.embed_tokens.weight
        assert torch.equal(model.lm_head.weight, load_tensors(tmp_path / name)[HEAD])


@pytest.mark.parametrize("flags", [(True, False), (False, True), (True, True)], ids=["outer", "inner", "both"])
@pytest.mark.parametrize("own", [False, True], ids=["tied", "own head"])
def test_a_language_tower_is_tied_by_either_config(flags, own, windows, tmp_path):
    folder, tokens = windows
    model, out, source = tmp_path / "model", tmp_path / "out", str(folder / "tokens.npy")
    make_llava(model)
    if not own:
        tensors = load_file(model / "model.safetensors")
        del tensors["language_model.lm_head.weight"]
        save_file(tensors, model / "model.safetensors", {"format": "pt"})
    raw = json.loads((model / "config.json").read_text())
    outer, inner = flags
    change_config(model, tie_word_embeddings=outer, text_config={**raw["text_config"], "tie_word_embeddings": inner})
    measured = run(folder, out, model=model, sparsity=0.5, eval=(source,)).perplexity[source]
    assert measured.before == pytest.approx(perplexity(model, tokens, AutoModelForImageTextToText), rel=1e-6)
    assert measured.after == pytest.approx(perplexity(out, tokens, AutoModelForImageTextToText), rel=1e-6)


def test_a_trained_head_is_not_taken_for_the_embedding(english_model, tmp_path):
    """The perplexity of the model whose config says nothing wrong, to the bit."""
    shutil.copytree(english_model, tmp_path / "model")
    change_config(tmp_path / "model", tie_word_embeddings=True)
    text = str(SHARED / "data" / "calibration-english.txt")
    fields = {"calibration": text, "samples": 8, "seqlen": 128, "eval": (text,), "eval_windows": 8, "method": "wanda"}
    fields["sparsity"] = 0.5
    right = run(tmp_path, tmp_path / "right", model=english_model, **fields).perplexity[text]
    found = run(tmp_path, tmp_path / "found", **fields).perplexity[text]
    assert found == right
    assert found.before == pytest.approx(40.84, abs=0.01)
