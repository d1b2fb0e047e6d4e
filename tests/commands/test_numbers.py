"""Numbers that are not finite: null in files, and said."""

import math

import pytest
from safetensors.torch import load_file, save_file

from shardprune import evaluate
from shardprune.cli import show
from shardprune.errors import SolverError
from shardprune.recipes.evaluate import EvaluateRecipe
from shardprune.report.page.write import write_report
from shardprune.report.progress import Reporter
from shardprune.storage.folder import Folder
from shardprune.storage.json_file import dump_json
from tests.support.running import run, search_run
from tests.support.tiny import make_model, make_tokens


@pytest.fixture(scope="module")
def broken(tmp_path_factory):
    """A model whose head has a row that is no number: every perplexity is none."""
    folder = tmp_path_factory.mktemp("broken")
    make_model(folder / "model", "llama")
    file = folder / "model" / "model.safetensors"
    tensors = load_file(file)
    tensors["lm_head.weight"][3] = math.nan
    save_file(tensors, file, {"format": "pt"})
    make_tokens(folder / "tokens.npy", samples=12, seed=0)
    return folder


REMARK = "Not finite, and therefore null in result.json: perplexity.{0}.before, perplexity.{0}.after."


def test_a_perplexity_that_is_no_number(broken, tmp_path, capsys):
    text = str(broken / "tokens.npy")
    result = run(broken, tmp_path / "o", sparsity=0.5, eval=(text,))
    assert math.isnan(result.perplexity[text].before)
    [stored] = Folder(str(tmp_path / "o"), "out").read_json("result.json")["perplexity"].values()
    assert (stored["before"], stored["after"]) == (None, None)
    again = run(broken, tmp_path / "o", sparsity=0.5, eval=(text,))  # nothing is measured again
    assert dump_json(again.as_json()) == dump_json(result.as_json())

    class Settings:
        out, report = str(tmp_path / "o"), False

    show(again, Settings())
    said = "".join(capsys.readouterr().out.split())  # lines end where the console does
    assert "".join(REMARK.format(text).split()) in said
    write_report(str(tmp_path / "o"))
    assert "Not finite, and therefore null in result.json" in (tmp_path / "o" / "report.html").read_text()
    asked = {"model": str(tmp_path / "o"), "perplexity": text, "seqlen": 24, "backend": "local", "threads": 1}
    for _ in range(2):  # the second time beside what the first one has measured
        evaluated = evaluate(EvaluateRecipe.checked(asked), Reporter(quiet=True))
    assert all(math.isnan(measured.value) for measured in evaluated.evaluation.perplexity.values())
    content = Folder(str(tmp_path / "o"), "out").read_json("result.json")
    assert [measured["value"] for measured in content["evaluation"]["perplexity"].values()] == [None]


def test_candidates_that_cannot_be_compared(broken, tmp_path):
    with pytest.raises(SolverError, match="^iteration 1: candidates cannot be compared by perplexity, which is L: nan"):
        search_run(broken, tmp_path / "o", remove=0.5)
