"""The recipe of docs/serving.md for llm-compressor, in its own environment: zeros stay, and the output loads."""

import json
import re
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.support.converters import llm_compressor
from tests.support.running import run
from tests.support.tiny import CONFIGS, make_model, make_tokens
from tests.support.words import words_tokenizer

PAGE = Path(__file__).parents[2] / "docs" / "serving.md"
TOKENS = [3, 4, 5, 9, 4, 7]
# Widths of whole groups of 128.
WIDE = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "head_dim": 32}
# Reads what was written as numbers again, and saves the weights of the layers and the logits of some tokens.
READING = """
import json, sys, torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, CompressedTensorsConfig
place, tokens, to = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(place, quantization_config=CompressedTensorsConfig(dequantize=True))
with torch.no_grad():
    found = {"logits": model(torch.tensor([json.loads(tokens)])).logits[0].float().contiguous()}
linear = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
found |= {name: module.weight.contiguous() for name, module in linear.items() if name != "lm_head"}
save_file(found, to)
"""


@pytest.fixture(scope="module")
def half(tmp_path_factory):
    """A model of which half of the weights are zero."""
    folder = tmp_path_factory.mktemp("half")
    make_model(folder / "model", "wide", configs={"wide": ("LlamaConfig", {**CONFIGS["llama"][1], **WIDE})})
    words_tokenizer().save_pretrained(folder / "model")
    make_tokens(folder / "tokens.npy")
    run(folder, "half", sparsity=0.5, method="magnitude", measure_error=False)
    return folder / "half"


def recipe():
    """The Python of the page that uses llm-compressor."""
    (code,) = re.findall(r"```python\n(from llmcompressor .+?)```", PAGE.read_text(), re.DOTALL)
    return code


@pytest.mark.parametrize(("scheme", "error"), [("W8A8", 0.02), ("W4A16", 0.3), ("FP8_DYNAMIC", 0.1)])
def test_zeros_stay_zeros_and_the_output_loads(half, tmp_path, scheme, error):
    python, made, found = llm_compressor(), tmp_path / "made", tmp_path / "found.safetensors"
    code = recipe().replace('"W8A8"', f'"{scheme}"').replace("runs/llama-8b-50-w8a8", f"{made}")
    code = code.replace("runs/llama-8b-50", f"{half}")
    for words in ([code], [READING, made, json.dumps(TOKENS), found]):
        done = subprocess.run([python, "-c", *words], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
    read, dense = load_file(found), AutoModelForCausalLM.from_pretrained(half)
    with torch.no_grad():
        wanted = dense(torch.tensor([TOKENS])).logits[0]
    logits = read.pop("logits")
    assert len(read) == 14
    for name, weight in read.items():
        zeros = dense.get_submodule(name).weight == 0
        assert zeros.float().mean() == pytest.approx(0.5, abs=0.01)
        assert not weight[zeros].any()
        assert weight[~zeros].any()
    assert 0 < float((logits - wanted).norm() / wanted.norm()) < error
