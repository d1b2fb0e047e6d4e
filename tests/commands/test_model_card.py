"""The model card of an output: made of the result alone, read by the hub's own client, kept where somebody wrote it."""

import json
import re
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard

import shardprune
from shardprune.cli import main
from shardprune.commands.check import check
from shardprune.recipes.commands import RECIPES
from tests.support.running import rebuild_run, run, search_run
from tests.support.tiny import differing, make_model, make_tokens
from tests.support.towers import TOWERS, make_tower
from tests.support.words import words_tokenizer

BASE = (
    "---\nlicense: other\nlicense_name: tiny-1\nlicense_link: https://example.org/l\nbase_model: someone/tiny\n---\n# x"
)


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("outputs")
    make_model(folder / "model", "llama-3.1")
    words_tokenizer().save_pretrained(folder / "model")
    (folder / "model" / "README.md").write_text(BASE)
    make_tokens(folder / "tokens.npy")
    tokens = str(folder / "tokens.npy")
    run(folder, "half", sparsity=0.5, method="wanda", eval=tokens)
    run(folder, "two-four", pattern="2:4", propagation="parallel", segments=2)
    run(folder, "composite", structured=0.3, sparsity=0.5)
    search_run(folder, "search", path="LG", remove=0.3, depth_rule="third-last")
    rebuild_run(folder, "rebuilt", "half")
    return folder


MADE = ("half", "two-four", "composite", "search", "rebuilt")


@pytest.mark.parametrize("name", MADE)
def test_every_command_leaves_a_card_that_the_hub_reads(name, outputs):
    card = ModelCard.load(outputs / name / "README.md")
    data = card.data.to_dict()
    assert data["base_model"] == "someone/tiny"
    assert (data["license"], data["license_name"]) == ("other", "tiny-1")
    assert data["library_name"] == "transformers"
    assert {"shardprune", "pruned"} <= {*data["tags"]}
    assert ("2:4" in data["tags"]) is (name == "two-four")
    assert ("sparse" in data["tags"]) is (name not in ("search",))
    assert "someone/tiny" in card.text
    assert "AutoModelForCausalLM.from_pretrained" in card.text
    assert str(outputs) not in card.content
    result = json.loads((outputs / name / "result.json").read_text())
    assert f"{result['model']['parameters_after']:,}" in card.text
    assert "README.md" not in result["files"]


def test_the_numbers_are_those_of_the_result(outputs):
    result = json.loads((outputs / "half" / "result.json").read_text())
    (measured,) = result["perplexity"].values()
    text = (outputs / "half" / "README.md").read_text()
    assert f"| perplexity, tokens.npy | {measured['before']:.3f} | {measured['after']:.3f} |" in text
    assert f"| sparsity | 0.0000 | {result['sparsity']['achieved']:.4f} |" in text
    assert not re.search("seconds|workers|peak", text)


@pytest.mark.parametrize("name", MADE)
def test_its_recipe_makes_the_same_tensors(name, outputs, tmp_path):
    text = (outputs / name / "README.md").read_text()
    command = re.search(r"`shardprune (\w+) --recipe", text)[1]
    values = yaml.safe_load(re.search(r"```yaml\n(.*?)```", text, re.DOTALL)[1])
    assert values.keys() <= RECIPES[command].model_fields.keys()
    assert values["model"] == "someone/tiny"
    places = {"model": str(outputs / "model"), "calibration": str(outputs / "tokens.npy")}
    places |= {"sparse": str(outputs / "half")} if command == "rebuild" else {}
    places |= {"eval": str(outputs / "tokens.npy")} if "eval" in values else {}
    here = {"out": str(tmp_path / "again"), "backend": "local", "threads": 1, "report": False}
    recipe = RECIPES[command].checked({**values, **places, **here})
    getattr(shardprune, command)(recipe)
    assert differing(tmp_path / "again", outputs / name) == []
    assert (tmp_path / "again" / "README.md").read_text() == text


@pytest.mark.parametrize("model_type", [name for name in TOWERS if name != "gemma3n"])
def test_its_lines_load_the_model(model_type, tmp_path):
    """Of gemma3n the vision part needs a package that need not be there."""
    make_tower(tmp_path / "model", model_type)
    words_tokenizer().save_pretrained(tmp_path / "model")
    make_tokens(tmp_path / "tokens.npy")
    run(tmp_path, "pruned", sparsity=0.5, method="magnitude")
    text = (tmp_path / "pruned" / "README.md").read_text()
    lines = re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]
    loaded: dict[str, Any] = {}
    exec(lines.replace("THIS MODEL", str(tmp_path / "pruned")), loaded)
    assert loaded["model"].config.model_type == model_type
    kind = "image-text-to-text" if "ImageTextToText" in lines else "text-generation"
    assert f"pipeline_tag: {kind}\n" in text


def test_the_dtype_of_a_run_stays_in_its_recipe(tmp_path):
    make_model(tmp_path / "model", "llama-3.1")
    make_tokens(tmp_path / "tokens.npy")
    run(tmp_path, "pruned", sparsity=0.5, dtype="float32")
    assert "\ndtype: float32\n" in (tmp_path / "pruned" / "README.md").read_text()


def test_without_a_base_on_the_hub(outputs, tmp_path):
    make_model(tmp_path / "model", "llama-3.1")
    run(outputs, tmp_path / "half", model=tmp_path / "model", sparsity=0.5)
    data = ModelCard.load(tmp_path / "half" / "README.md").data.to_dict()
    assert not {"base_model", "license"} & data.keys()
    (tmp_path / "model" / "README.md").write_text("---\nlicense: [\n---\n")
    run(outputs, tmp_path / "other", model=tmp_path / "model", sparsity=0.5)
    assert "Its licence is not known" in (tmp_path / "other" / "README.md").read_text()


def test_what_is_measured_later_joins_it_and_a_changed_card_stays(outputs, tmp_path):
    run(outputs, tmp_path / "half", sparsity=0.5)
    card = tmp_path / "half" / "README.md"
    before = card.read_text()

    def measure(text):
        words = ["evaluate", f"{tmp_path}/half", "--perplexity", text, "--seqlen", "24", "--no-report"]
        with pytest.raises(SystemExit) as ended:
            main([*words, "--backend", "local", "--threads", "1"])
        assert ended.value.code == 0

    measure(str(outputs / "tokens.npy"))
    renewed = card.read_text()
    assert "| tokens.npy | perplexity | " in renewed
    assert "tokens.npy | perplexity" not in before
    card.write_text(renewed + "Mine.\n")
    make_tokens(tmp_path / "other.npy", seed=3)
    measure(str(tmp_path / "other.npy"))
    assert card.read_text() == renewed + "Mine.\n"
    (verdict,) = check(str(tmp_path / "half"))
    assert not verdict.faults
