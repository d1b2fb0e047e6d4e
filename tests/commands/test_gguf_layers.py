"""Layers that llama.cpp knows by their index alone: models that lost other ones are refused, the rest pass."""

import os
import re
from pathlib import Path

import pytest
from transformers import AutoConfig

from shardprune.cli import main
from shardprune.commands.gguf_layers import FULL_ATTENTION, NO_POSITIONS, check_layers
from shardprune.errors import InputError
from tests.support.running import search_run
from tests.support.tiny import make_model, make_tokens

# Their names in llama.cpp's sources, where they differ from those of transformers.
SOURCES = {"gemma3_text": "gemma3", "gpt_oss": "openai-moe", "llama4_text": "llama4"}
WRITING = "import sys; from pathlib import Path; Path(sys.argv[3]).write_text('gguf')"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("layers")
    make_model(folder / "model", "gemma2")
    make_tokens(folder / "tokens.npy")
    (folder / "writing.py").write_text(WRITING)
    return folder


@pytest.mark.parametrize(
    ("path", "left", "refused"),
    [
        ("L", ["sliding_attention", "sliding_attention", "full_attention"], True),
        ("LL", ["sliding_attention", "full_attention"], False),
    ],
)
def test_a_gemma_2_without_some_layers(folder, tmp_path, capsys, path, left, refused):
    search_run(folder, tmp_path / "out", path=path, scores=False)
    assert AutoConfig.from_pretrained(tmp_path / "out").layer_types == left
    words = ["export", str(tmp_path / "out"), "--to", str(tmp_path / "made"), "--format", "gguf", "--converter"]
    with pytest.raises(SystemExit) as ended:
        main([*words, str(folder / "writing.py")])
    assert ended.value.code == (2 if refused else 0)
    assert (tmp_path / "made").exists() != refused
    if refused:
        assert capsys.readouterr().err.splitlines()[-1] == (
            "error: format: 'gguf' has no word for which layers have attention over all tokens: llama.cpp takes the "
            "last of every 2 layers of a gemma2 for one, and here they are 2 of 0 to 2"
        )


@pytest.mark.parametrize("family", sorted({*FULL_ATTENTION, *NO_POSITIONS}))
def test_the_families_own_layers_pass_and_those_without_the_first_do_not(family):
    whole = AutoConfig.for_model(family)
    check_layers(whole)
    for field in ("layer_types", "no_rope_layers"):
        if len(set(getattr(whole, field, None) or ())) > 1:
            config = AutoConfig.for_model(family)
            config.num_hidden_layers -= 1
            setattr(config, field, getattr(config, field)[1:])
            with pytest.raises(InputError, match=f"^format: 'gguf' has no word for .* layers of a {family} for one"):
                check_layers(config)


def test_a_model_of_one_kind_of_layers_passes_where_llama_cpp_is_told():
    config = AutoConfig.for_model("llama4_text", layer_types=["full_attention"] * 48)
    check_layers(config)
    config = AutoConfig.for_model("gemma2", layer_types=["full_attention"] * 26)
    with pytest.raises(InputError, match="here they are 0, 1, 2, "):
        check_layers(config)


def test_the_periods_are_those_of_llama_cpp():
    models = Path(os.environ.get("LLAMA_CPP", "")) / "src" / "models"
    if not models.is_dir():
        pytest.skip("LLAMA_CPP names no folder with src/models")
    for family, period in FULL_ATTENTION.items():
        source = (models / f"{SOURCES.get(family, family)}.cpp").read_text()
        assert re.search(r"load_swa_pattern\(ml, (\d+)\)", source).group(1) == str(period), family
    assert "n_no_rope_layer_step = 4;" in (models / "smollm3.cpp").read_text()
