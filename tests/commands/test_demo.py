"""The bundled model: small enough, trained well enough, and in order."""

import json
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

from shardprune import prune
from shardprune.recipes.demo import bundled_model, demo_recipe
from shardprune.report.progress import Reporter


def test_the_bundled_model_is_small_and_loads():
    folder = Path(bundled_model())
    assert sum(file.stat().st_size for file in folder.iterdir()) < 10 * 2**20
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.config.num_hidden_layers >= 8
    assert model.config.num_key_value_heads < model.config.num_attention_heads
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = "def read(self, size=-1):\n    return self.file.read(size)  # naïve\n"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    curve = json.loads((folder / "training.json").read_text())["curve"]
    assert curve[-1]["heldout_perplexity"] < 20


def test_the_demo_loses_little_and_its_result_loads_with_its_tokenizer(tmp_path):
    recipe = demo_recipe(str(tmp_path / "o"), shards=2)
    result = prune(
        recipe.model_copy(update={"backend": "local", "threads": 2, "eval_windows": 20}), Reporter(quiet=True)
    )
    measured = result.perplexity["stdlib"]
    assert measured.before < 25
    assert measured.before < measured.after < 1.5 * measured.before
    assert round(result.sparsity.achieved, 4) == 0.5
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "o")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "o")
    prompt = tokenizer("import os\n\ndef ", return_tensors="pt")
    assert model.generate(prompt.input_ids, max_new_tokens=8, do_sample=False).shape[1] == prompt.input_ids.shape[1] + 8
