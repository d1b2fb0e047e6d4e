"""Converters of other projects and the models that they are tried on, where they are installed.

pip install ctranslate2 gguf sentencepiece torchao    # or an environment that has them
export LLAMA_CPP=...      # sources of llama.cpp: a checkout, or vendor/llama.cpp of llama-cpp-python's sdist
export OPTIMUM_CLI=...    # optimum-cli of an environment with optimum-intel[openvino]
export LLM_COMPRESSOR=... # Python of an environment with llmcompressor
"""

import os
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from shardprune.commands.converters import program_of
from shardprune.errors import InputError

SCRIPT = "convert_hf_to_gguf.py"


def llama_cpp() -> Path:
    """The sources of llama.cpp; skips the test where there are none."""
    for package in ("gguf", "sentencepiece"):
        pytest.importorskip(package, reason=f"{package} is not installed: pip install 'shardprune[gguf]'")
    place = Path(os.environ.get("LLAMA_CPP", ""))
    if not (place / SCRIPT).is_file():
        pytest.skip(f"LLAMA_CPP names no folder with {SCRIPT}")
    return place


def optimum_cli() -> str:
    """The program of optimum; skips the test where there is none."""
    place = os.environ.get("OPTIMUM_CLI", "")
    if not os.access(place, os.X_OK):
        pytest.skip("OPTIMUM_CLI names no optimum-cli of an environment with optimum-intel[openvino]")
    return place


def llm_compressor() -> str:
    """The interpreter that has llm-compressor; skips the test where there is none."""
    place = os.environ.get("LLM_COMPRESSOR", "")
    if not os.access(place, os.X_OK):
        pytest.skip("LLM_COMPRESSOR names no Python of an environment with llmcompressor")
    return place


def installed(format: str) -> str:
    """The program of a format's converter; skips the test where there is none."""
    try:
        return program_of(format, None)[0]
    except InputError as error:
        pytest.skip(str(error))


def gpt2_tokenizer(sources: Path) -> PreTrainedTokenizerFast:
    """GPT-2's tokenizer of 50,257 tokens from the vocabulary that llama.cpp is tested with: its converter knows real
    tokenizers by their tokens of a text, and no others."""
    from gguf import GGUFReader

    fields = GGUFReader(sources / "models" / "ggml-vocab-gpt-2.gguf").fields
    tokens, merges = (fields[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "merges"))
    vocabulary = {token: index for index, token in enumerate(tokens)}
    bpe = models.BPE(vocabulary, [tuple(merge.split(" ")) for merge in merges])
    tokenizer = Tokenizer(bpe)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    end = "<|endoftext|>"
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=end, eos_token=end, unk_token=end)
