"""When a report is written, where it lies, and what is said where there can be none."""

import csv
import json
import re
import shutil

import pytest

from shardprune import EvaluateRecipe, evaluate
from shardprune.cli import main
from shardprune.errors import InputError, StorageError
from shardprune.report.page.comparison import Point, Text, comparison_rows, points_of
from shardprune.report.page.comparison_data import as_csv, as_json, is_generated
from shardprune.report.page.finished_run import finished_runs
from shardprune.report.page.place import place_of_report
from shardprune.report.page.write import write_comparison, write_report
from shardprune.report.progress import Reporter
from shardprune.storage.folder import Folder
from tests.report.reading import cells, page_of
from tests.support.running import run, search_run
from tests.support.tiny import snapshot


def test_a_report_is_written_unless_it_is_not_wanted(runs, tmp_path):
    fields = {"sparsity": 0.5, "samples": 4}
    assert run(runs.folder, tmp_path / "without", **fields, report=False)
    assert not (tmp_path / "without" / "report.html").exists()
    run(runs.folder, tmp_path / "with", **fields, report=True)
    before = snapshot(tmp_path / "with")
    run(runs.folder, tmp_path / "with", **fields, report=True)
    assert snapshot(tmp_path / "with") == before, "a finished run does nothing"
    (tmp_path / "with" / "report.html").unlink()
    run(runs.folder, tmp_path / "with", **fields, report=True)
    assert page_of(tmp_path / "with").startswith("<!DOCTYPE html>")


def test_a_report_that_cannot_be_written_ends_nothing(runs, tmp_path, monkeypatch, capsys):
    """The run's result stands, the next step of a pipeline begins, and what went wrong is said."""
    write = Folder.write

    def full(self, name, parts):
        if name == "report.html":
            raise StorageError(self.field, "no space left")
        return write(self, name, parts)

    monkeypatch.setattr(Folder, "write", full)
    tokens = str(runs.folder / "tokens.npy")
    words = [
        "prune",
        str(runs.folder / "model"),
        "--out",
        str(tmp_path / "o"),
        "--sparsity",
        "0.5",
        "--backend",
        "local",
    ]
    with pytest.raises(SystemExit) as end:
        main([*words, "--calibration", tokens, "--samples", "4", "--seqlen", "24"])
    said = capsys.readouterr()
    assert end.value.code == 0
    assert f"no report was written: out: no space left; `shardprune report {tmp_path}/o` tries again" in said.err
    assert "report:" not in said.out
    fields = {"model": str(tmp_path / "o"), "perplexity": tokens, "seqlen": 24, "backend": "local"}
    assert evaluate(EvaluateRecipe.checked(fields), Reporter(quiet=True)).evaluation.perplexity
    with pytest.raises(InputError, match="no space left"):
        write_report(str(tmp_path / "o"))


def test_a_page_holds_no_credentials(runs):
    out = "memory://user:s3cret@reports/out"
    run(runs.folder, out, sparsity=0.5, samples=4, report=True)
    page = Folder(out, "out").read_text("report.html")
    assert "memory://reports/out" in page
    assert "s3cret" not in page
    assert place_of_report(out) == "memory://reports/out/report.html"


def test_an_evaluation_joins_the_report(runs, tmp_path):
    tokens = str(runs.folder / "tokens.npy")
    run(runs.folder, tmp_path / "out", sparsity=0.5, samples=4, report=True)
    fields = {"model": str(tmp_path / "out"), "perplexity": tokens, "seqlen": 24, "backend": "local"}
    result = evaluate(EvaluateRecipe.checked(fields), Reporter(quiet=True))
    (measured,) = result.evaluation.perplexity.values()
    assert f"{measured.value:.3f}" in cells(page_of(tmp_path / "out"))
    evaluate(EvaluateRecipe.checked({**fields, "out": str(tmp_path / "alone")}), Reporter(quiet=True))
    assert f"{measured.value:.3f}" in cells(page_of(tmp_path / "alone"))
    assert result.recipe["out"] == str(tmp_path / "out")


def test_the_command_line_says_where_reports_are(runs, tmp_path, capsys):
    out = tmp_path / "out"
    words = ["prune", str(runs.folder / "model"), "--out", str(out), "--sparsity", "0.5", "--backend", "local"]
    words += ["--calibration", str(runs.folder / "tokens.npy"), "--samples", "4", "--seqlen", "24"]
    with pytest.raises(SystemExit) as end:
        main(words)
    assert end.value.code == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"report: {out}/report.html"
    with pytest.raises(SystemExit):
        main([*words, "--no-report"])
    assert "report:" not in capsys.readouterr().out
    first = page_of(out)
    (out / "report.html").unlink()
    with pytest.raises(SystemExit) as end:
        main(["report", str(out), str(runs.folder / "owl")])
    assert end.value.code == 0
    assert capsys.readouterr().out.splitlines() == [
        f"report: {place}/report.html" for place in (out, runs.folder / "owl")
    ]
    assert page_of(out) == first
    with pytest.raises(SystemExit) as end:
        main(
            ["report", "--compare", str(runs.folder / "owl"), str(runs.folder / "mop"), "--file", f"{tmp_path}/x.html"]
        )
    assert end.value.code == 0
    assert capsys.readouterr().out == f"report: {tmp_path}/x.html\n"
    with pytest.raises(SystemExit) as end:
        main(["report", str(out), "--file", "y.html"])
    assert end.value.code == 2
    assert capsys.readouterr().err == "error: file: 'y.html' is for --compare; a report is OUT/report.html\n"
    assert (tmp_path / "x.html").is_file()


def test_a_report_lies_where_the_output_does(runs):
    out = "memory://reports/out"
    run(runs.folder, out, sparsity=0.5, samples=4, report=True)
    assert Folder(out, "out").read_text("report.html").startswith("<!DOCTYPE html>")


def test_there_is_none_of_what_is_not_finished(runs, tmp_path, dies_at_layer):
    dies_at_layer(1)
    with pytest.raises(KeyboardInterrupt):
        run(runs.folder, tmp_path / "cut", sparsity=0.5, report=True)
    for out in ("cut", "nothing"):
        with pytest.raises(InputError, match="out: .*holds no finished run; `shardprune status` says where one stands"):
            write_report(str(tmp_path / out))


def test_a_comparison_names_what_is_not_finished(runs, tmp_path, dies_at_layer, capsys):
    dies_at_layer(1)
    with pytest.raises(KeyboardInterrupt):
        run(runs.folder, tmp_path / "cut", sparsity=0.5)
    outs = [str(runs.folder / "owl"), str(tmp_path / "cut"), str(runs.folder / "mop")]
    with pytest.raises(SystemExit) as end:
        main(["report", "--compare", *outs, "--file", f"{tmp_path}/x.html"])
    assert end.value.code == 0
    said = capsys.readouterr()
    assert said.out == f"report: {tmp_path}/x.html\n"
    assert re.fullmatch(r"not finished: cut \(stopped, prune, \d+%\)\n", said.err)
    page = (tmp_path / "x.html").read_text()
    assert re.search(r"Not finished, and therefore not on this page: cut \(stopped, prune, \d+%\)\.", page)
    assert [cell for cell in cells(page) if cell in ("owl", "mop", "cut")] == ["owl", "mop"]
    with pytest.raises(SystemExit) as end:
        main(["report", "--compare", *outs, "--file", f"{tmp_path}/x.html"])  # over a page of before
    assert end.value.code == 0
    (tmp_path / "mine.html").write_text("mine")
    with pytest.raises(InputError, match="file: .*mine.html' exists and is no report"):
        write_comparison(outs, f"{tmp_path}/mine.html")
    with pytest.raises(InputError, match="file: .*x.json' does not end in .html"):
        write_comparison(outs, f"{tmp_path}/x.json")
    with pytest.raises(InputError, match="file: .* is too long for a path: at most 4,095 bytes"):
        write_comparison(outs, f"{tmp_path}/" + "a/" * 3000 + "x.html")
    assert (tmp_path / "mine.html").read_text() == "mine"
    shutil.copytree(tmp_path / "cut", tmp_path / "again")
    with pytest.raises(InputError, match="none of the runs measured a perplexity.*; not finished: cut"):
        write_comparison([str(tmp_path / "cut"), str(tmp_path / "again")], str(tmp_path / "y.html"))


def test_a_comparison_names_what_has_no_perplexity(runs, tmp_path, capsys):
    run(runs.folder, tmp_path / "unmeasured", sparsity=0.5, method="magnitude")
    outs = [str(runs.folder / "owl"), str(tmp_path / "unmeasured"), str(runs.folder / "mop")]
    with pytest.raises(SystemExit) as end:
        main(["report", "--compare", *outs, "--file", f"{tmp_path}/x.html"])
    assert end.value.code == 0
    assert capsys.readouterr().err == "no perplexity (--eval): unmeasured\n"
    assert (
        "Without a perplexity (--eval), and therefore not on this page: unmeasured."
        in (tmp_path / "x.html").read_text()
    )


def test_a_comparison_has_its_numbers_beside_it(runs, tmp_path):
    outs = [str(runs.folder / name) for name in ("owl", "mop")]
    for _ in range(2):  # the second time over the first one's files
        write_comparison(outs, f"{tmp_path}/x.html")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["x.csv", "x.html", "x.json"]
    found = json.loads((tmp_path / "x.json").read_text())
    assert found["generator"] == "shardprune report --compare"
    dense, owl, mop = found["models"]
    (measured,) = runs.results["owl"].perplexity.values()
    facts = {"text": "tokens.npy", "windows": measured.windows, "seqlen": 24, "tokens_sha256": measured.tokens_sha256}
    unmeasured = {"decode_tokens_per_second": None, "decode_of_dense": None, "accuracy": None, "tasks": 0}
    base = {"run": "model", **facts, "perplexity": measured.before, "compression": 0.0, "seconds": 0.0}
    assert dense == {**base, "method": "", "removed": 0.0, "zeroed": 0.0, "bytes": None, **unmeasured}
    size = runs.results["owl"].model
    assert {name: value for name, value in owl.items() if name != "seconds"} == {
        **{"run": "owl", **facts, "perplexity": measured.after},
        "compression": pytest.approx(size.zeros_after / size.parameters_before),
        **{"method": "prune, sparsegpt unstructured", "removed": 0.0, "zeroed": owl["compression"]},
        "bytes": sum(file.stat().st_size for file in (runs.folder / "owl").glob("*.safetensors")),
        **unmeasured,
    }
    assert (mop["removed"], mop["zeroed"]) == (mop["compression"], 0.0)
    assert owl["seconds"] > 0
    assert (mop["run"], mop["compression"]) == ("mop", pytest.approx(runs.results["mop"].model.removed))
    with (tmp_path / "x.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    texts = [{name: "" if value is None else str(value) for name, value in of.items()} for of in found["models"]]
    assert lines == texts
    assert "unrounded, lie beside this page: x.json, x.csv." in page_of(tmp_path, "x.html")


@pytest.mark.parametrize("name", ["x.json", "x.csv"])
def test_what_lies_beside_a_comparison_and_is_not_its_own_stays(runs, tmp_path, name):
    (tmp_path / name).write_text('{"generator": "mine"}')
    outs = [str(runs.folder / out) for out in ("owl", "mop")]
    with pytest.raises(
        InputError, match=f"file: .*x.html': '{name}', for its numbers, exists and is not of a comparison"
    ):
        write_comparison(outs, f"{tmp_path}/x.html")
    assert snapshot(tmp_path).keys() == {name}
    assert (tmp_path / name).read_text() == '{"generator": "mine"}'


def test_a_table_has_what_was_measured_of_every_model(runs, tmp_path):
    """Numbers of a later evaluation, and those of the whole line of a model that was made of another output."""
    shutil.copytree(runs.folder / "composite", tmp_path / "a")
    result = json.loads((tmp_path / "a" / "result.json").read_text())
    rate = {"least": 1.0, "most": 9.0}
    speeds = [
        {"model": model, "batch": batch, "prefill": {"median": 9.0, **rate}, "decode": {"median": decode, **rate}}
        for model, batch, decode in (("pruned", 4, 1.0), ("pruned", 1, 1500.0), ("dense", 1, 1000.0))
    ]
    tasks = {
        name: {"metrics": {"acc": {"value": value}, "acc_norm": {"value": 0.9}}, "samples": 4, "num_fewshot": 0}
        for name, value in (("one", 0.25), ("two", 0.5))
    }
    latency = {"device": "cpu", "dtype": "float32", "threads": 1, "prompt": 8, "tokens": 8, "rounds": 3}
    weights = {"pruned": {"bytes": 1, "parameters": 1}}
    result["evaluation"] = {"tasks": tasks, "latency": {**latency, "weights": weights, "speeds": speeds}}
    (tmp_path / "a" / "result.json").write_text(json.dumps(result))
    found = [
        point
        for out in (tmp_path / "a", runs.folder / "rebuilt")
        for point in points_of(finished_runs(str(out)), {str(tmp_path / "a"): "a", f"{runs.folder}/rebuilt": "rebuilt"})
    ]
    dense, composite, rebuilt = comparison_rows(found)
    size = sum(file.stat().st_size for file in (tmp_path / "a").glob("*.safetensors")) / 1e6
    shares = [f"{share:.1%}" for share in (found[1].product.removed, found[1].product.zeroed)]
    assert float(shares[0][:-1]) > 5 < float(shares[1][:-1])
    assert composite[5:10] == (*shares, f"{size:,.1f}", "1,500.0, 1.50 x", "0.3750 (2)")
    assert dense[5:10] == ("0.0%", "0.0%", "-", "-", "-")
    assert rebuilt[2].startswith("prune, wanda unstructured + rebuild, ")


def test_a_perplexity_that_is_not_finite_has_no_number_in_json(tmp_path):
    text = Text("/far/=1+1", 24, 2, "a")
    points = [Point("x,\n\u202e", text, float("nan"), 0.5, 1.0), Point("y", text, 2.0, 0.5, 1.0)]
    first, second = json.loads(as_json(points))["models"]
    assert (first["perplexity"], second["perplexity"]) == (None, 2.0)
    assert first["run"] == "x, \\u202e"
    for name, made in (("a.json", as_json(points)), ("a.csv", as_csv(points))):
        assert is_generated(name, made.encode())
    assert [row[0] for row in csv.reader(as_csv(points).splitlines())] == ["run", first["run"], "y"]


@pytest.mark.parametrize("content", ["[]", "{}", '{"command": "prune"}', '{"command": "evaluate", "seconds": 1}'])
def test_what_is_no_result_is_said(tmp_path, content):
    (tmp_path / "result.json").write_text(content)
    with pytest.raises(InputError, match="out: .*/result.json is no result of a run: it "):
        write_report(str(tmp_path))


@pytest.mark.parametrize(
    ("names", "problem"),
    [
        (["owl"], "is one output; give two or more"),
        (["owl", "owl"], "is one output; give two or more"),
        (["owl", "nothing"], "holds no finished run"),
        (["owl", "old"], "was written before zeros were counted; start its command again"),
        (["unmeasured", "also"], "none of the runs measured a perplexity"),
    ],
)
def test_what_cannot_be_compared_is_said(runs, tmp_path, names, problem):
    if "old" in names:
        (runs.folder / "old").mkdir()
        result = json.loads((runs.folder / "owl" / "result.json").read_text())
        del result["model"]["zeros_after"]
        (runs.folder / "old" / "result.json").write_text(json.dumps(result))
    if "also" in names:
        for name in names:
            search_run(runs.folder, name, path="L")
    with pytest.raises(InputError, match=problem):
        write_comparison([str(runs.folder / name) for name in names], str(tmp_path / "x.html"))
    assert not (tmp_path / "x.html").exists()
