"""Models without a row in the table of families are trained and written as ordinary checkpoints."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.recovery.trainings import furthest, train
from tests.support.architectures import DENSE, make_architecture
from tests.support.tiny import load_tensors, make_tokens


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
