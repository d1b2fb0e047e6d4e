"""Outputs beside one another: their names, sizes, seconds, and the model that they come from."""

import json
import shutil

import pytest
from safetensors.torch import load_file, save_file

from shardprune.errors import InputError
from shardprune.report.page.comparison import HEADINGS, comparison_rows, comparisons, names_of, points_of
from shardprune.report.page.comparison_data import as_json
from shardprune.report.page.finished_run import finished_runs
from shardprune.report.page.write import write_comparison
from tests.report.reading import projections
from tests.support.running import run, search_run
from tests.support.tiny import make_model


def points(out):
    found = finished_runs(str(out))
    return points_of(found, names_of(run.folder for run in found))


def test_outputs_have_names_that_differ():
    assert names_of(["/a/x", "/b/x", "/b/y", "s3://c/x", "/p/pruned"]) == {
        "/a/x": "a/x",
        "/b/x": "b/x",
        "/b/y": "y",
        "s3://c/x": "c/x",
        "/p/pruned": "p/pruned",
    }


def test_points_of_a_comparison_count_parameters(runs):
    for name in ("owl", "composite", "mop"):
        dense, point = points(runs.folder / name)
        (measured,) = runs.results[name].perplexity.values()
        assert (dense.name, dense.perplexity, dense.compression) == ("model", measured.before, 0)
        assert (point.name, point.perplexity) == (name, measured.after)
        original = sum(value.numel() for value in load_file(runs.folder / "model" / "model.safetensors").values())
        files = [load_file(file) for file in (runs.folder / name).glob("*.safetensors")]
        left = sum(value.numel() for file in files for value in file.values())
        zeros = sum((weight == 0).sum().item() for _, _, weight in projections(runs.folder / name))
        assert point.compression == pytest.approx(1 - (left - zeros) / original)
        assert point.seconds == pytest.approx(runs.results[name].seconds["total"], abs=0.5)


def test_a_recovered_model_is_compared_with_the_original(runs):
    """Whether the output of the pipeline is given, or that of its last step."""
    whole = points(runs.folder / "pipeline")
    alone = points(runs.folder / "pipeline" / "recovered")
    results = [runs.results[step] for step in ("prune", "recover")]
    assert [point.name for point in whole] == ["model", "pipeline/pruned", *2 * ["pipeline/recovered"]]
    assert alone == [whole[0], *whole[2:]]
    assert whole[-1].seconds == pytest.approx(sum(result.seconds["total"] for result in results), abs=1)
    model = results[1].model
    assert whole[-1].compression == pytest.approx(model.zeros_after / model.parameters_before)


def test_models_are_compared_with_the_first_of_their_line(runs):
    """Whatever commands made them one after another, as long as their outputs lie where they were."""
    run(runs.folder, "then", "mop", sparsity=0.5, eval=[str(runs.folder / "tokens.npy")])
    rebuilt, wanda = points(runs.folder / "rebuilt"), points(runs.folder / "wanda")
    assert [point.name for point in rebuilt] == ["model", "rebuilt"]
    assert rebuilt[0] == wanda[0]
    assert rebuilt[1].seconds > wanda[1].seconds
    dense, then = points(runs.folder / "then")
    (measured,) = runs.results["mop"].perplexity.values()
    assert (dense.name, dense.perplexity) == ("model", measured.before)
    zeros = sum((weight == 0).sum().item() for _, _, weight in projections(runs.folder / "then"))
    model = runs.results["mop"].model
    assert then.compression == pytest.approx(1 - (model.parameters_after - zeros) / model.parameters_before)


def test_an_output_may_lie_where_its_model_was(runs, tmp_path):
    shutil.copytree(runs.folder / "model", tmp_path / "m")
    run(tmp_path, "o", "m", sparsity=0.5, calibration=str(runs.folder / "tokens.npy"))
    shutil.rmtree(tmp_path / "m")
    (tmp_path / "o").rename(tmp_path / "m")
    (alone,) = finished_runs(str(tmp_path / "m"))
    assert alone.model == alone.name == "m"
    assert points(tmp_path / "m") == []  # measured on nothing, and in the end


def test_a_sparse_model_of_unknown_origin_is_no_dense_one(runs, tmp_path):
    """Nor is a folder that holds another program's result.json the run that made it."""
    shutil.copytree(runs.folder / "wanda", tmp_path / "sparse")
    (tmp_path / "sparse" / "result.json").write_text('{"results": {}}')
    run(
        tmp_path,
        "out",
        "sparse",
        sparsity=0.7,
        calibration=str(runs.folder / "tokens.npy"),
        eval=[str(runs.folder / "tokens.npy")],
    )
    (point,) = points(tmp_path / "out")
    assert point.name == "out"


def test_a_few_zeros_by_rounding_leave_a_model_dense(runs, tmp_path):
    make_model(tmp_path / "model", "llama-3.1")
    (file,) = (tmp_path / "model").glob("*.safetensors")
    tensors = load_file(file)
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = 0.0
    save_file(tensors, file, {"format": "pt"})
    tokens = str(runs.folder / "tokens.npy")
    result = run(tmp_path, "out", method="magnitude", sparsity=0.5, calibration=tokens, eval=[tokens])
    assert 0 < result.sparsity.before < 0.001
    assert [point.name for point in points(tmp_path / "out")] == ["model", "out"]


def test_zeros_of_a_sparse_model_that_lost_structures_are_not_known(runs, tmp_path):
    tokens = str(runs.folder / "tokens.npy")
    search_run(runs.folder, tmp_path / "less", "wanda", path="L", eval=[tokens])
    *_, point = points(tmp_path / "less")
    assert (point.product.zeroed, point.compression) == (None, None)
    assert point.product.removed > 0
    *_, row = comparison_rows([point])
    assert row[HEADINGS.index("zero")] == "-"
    assert json.loads(as_json([point]))["models"][0]["zeroed"] is None
    write_comparison([str(runs.folder / "wanda"), str(tmp_path / "less")], str(tmp_path / "c.html"))
    by_compression, by_time = comparisons([*points(runs.folder / "wanda"), point])
    assert len(by_compression.figure.data) == len(by_time.figure.data) - 1 == 2


def test_the_mean_accuracy_is_that_of_tasks(runs, tmp_path):
    """A group beside them has the mean of some of these already."""
    out = tmp_path / "out"
    shutil.copytree(runs.folder / "wanda", out)
    scored = {name: {"metrics": {"acc": {"value": value}}, "samples": 10, "num_fewshot": 0, "group": name == "both"}
              for name, value in {"a": 0.9, "b": 0.4, "both": 0.65, "c": 1.0}.items()}  # fmt: skip
    result = json.loads((out / "result.json").read_text())
    (out / "result.json").write_text(json.dumps(result | {"evaluation": {"tasks": scored}}))
    *_, point = points(out)
    assert point.product.accuracy == pytest.approx((0.9 + 0.4 + 1.0) / 3)
    assert point.product.tasks == 3


def test_an_output_is_compared_once_however_it_is_spelled(runs, tmp_path, monkeypatch):
    monkeypatch.chdir(runs.folder)
    for other in ("./wanda", str(runs.folder / "wanda"), "wanda/"):
        with pytest.raises(InputError, match="^compare: .* is one output; give two or more"):
            write_comparison(["wanda", other], str(tmp_path / "c.html"))
