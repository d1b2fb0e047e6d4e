"""Models without a row in the table of families are trained and written as ordinary checkpoints."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from shardprune.errors import InputError
from tests.recovery.trainings import furthest, train
from tests.support.architectures import DENSE, make_architecture
from tests.support.tiny import load_tensors, make_tokens
from tests.support.towers import make_tower


# Persistent buffers; other names on disk; attention and MLP that read the same input.
@pytest.mark.parametrize(("model_type", "full"), [("apertus", True), ("gpt_neox", False), ("falcon", False)])
def test_an_architecture_is_trained(folder, model_type, full, tmp_path):
    path = make_architecture(tmp_path / "model", model_type, DENSE[model_type])
    file = tmp_path / "model" / "model.safetensors"
    tensors = load_file(file)
    for tensor in tensors.values():
        if tensor.dim() == 2 and len(tensor) != 64:  # the embeddings have as many rows as there are tokens
            tensor[tensor.abs() < tensor.abs().median()] = 0
    save_file(tensors, file, {"format": "pt"})
    data = make_tokens(tmp_path / "tokens.npy", 20, 12)
    result = train(folder, tmp_path / "o", model=path, data=data, full=full, steps=2, keep_sparsity=True, length=12)
    _, report = AutoModelForCausalLM.from_pretrained(tmp_path / "o", output_loading_info=True)
    assert not any(report.values()), report
    before, after = load_tensors(path), load_tensors(tmp_path / "o")
    assert {name: tensor.shape for name, tensor in before.items()} == {n: t.shape for n, t in after.items()}
    assert furthest(before, after) > 1e-6
    assert result.sparsity.achieved == result.sparsity.before > 0.3
    assert all(torch.equal(before[name], after[name]) for name in before if "act_fn.beta" in name)


def test_layers_that_are_not_run_for_text_stay_as_they_are(folder, tmp_path):
    path = make_tower(tmp_path / "model", "mllama")
    data = make_tokens(tmp_path / "tokens.npy", 20, 12)
    fields = {"model": path, "data": data, "steps": 2, "length": 12}
    with pytest.raises(InputError, match="^full: text does not train all weights: 2 of 4 layers are not run for text;"):
        train(folder, tmp_path / "full", **fields, full=True)
    assert not (tmp_path / "full").exists()
    train(folder, tmp_path / "o", **fields)
    _, report = AutoModelForImageTextToText.from_pretrained(tmp_path / "o", output_loading_info=True)
    assert not any(report.values()), report
    before, after = load_tensors(path), load_tensors(tmp_path / "o")
    assert before.keys() == after.keys()
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert len(changed) == 2 * 7
    assert all(".layers.0." in name or ".layers.2." in name for name in changed)
