"""What stands on a report, against the tensors and events that it is about; when one is written, and when not."""

import html
import json
import re
import shutil

import pytest
import yaml
from safetensors.torch import load_file

from shardprune import EvaluateRecipe, evaluate
from shardprune.cli import main
from shardprune.errors import InputError, StorageError
from shardprune.report.events import read_events
from shardprune.report.page.comparison import names_of, points_of
from shardprune.report.page.finished_run import finished_runs
from shardprune.report.page.place import place_of_report
from shardprune.report.page.write import write_comparison, write_report
from shardprune.report.progress import Reporter
from shardprune.storage.folder import Folder
from tests.support.running import run, search_run
from tests.support.tiny import make_model, snapshot


def page_of(out):
    return (out / "report.html").read_text()


def figures(page):
    """The figures on a page by title, and what its tables and facts say."""
    titles = [html.unescape(title) for title in re.findall(r"<h3>(.*?)</h3>", page)]
    found = re.findall(r'<script type="application/json"[^>]*>(.*?)</script>', page, re.DOTALL)
    return dict(zip(titles, (json.loads(text) for text in found), strict=True))


def cells(page):
    return [html.unescape(cell) for cell in re.findall(r"<(?:td|dd)[^>]*>(.*?)</(?:td|dd)>", page)]


def projections(out):
    """All weights of projections by layer and name, from the files of a checkpoint."""
    tensors = {name: value for file in out.glob("*.safetensors") for name, value in load_file(file).items()}
    for name, value in tensors.items():
        if match := re.fullmatch(r"model\.layers\.(\d+)\.(.*_proj)\.weight", name):
            yield int(match[1]), match[2].rsplit(".", 1)[-1].removesuffix("_proj"), value


def test_the_map_of_sparsity_counts_the_zeros_that_were_written(runs):
    (trace,) = figures(page_of(runs.folder / "owl"))["Sparsity by layer and projection (% of weights)"]["data"]
    rows = dict(zip(map(int, trace["y"]), trace["z"], strict=True))
    found = {(layer, name): z for layer in rows for name, z in zip(trace["x"], rows[layer], strict=True)}
    counted = list(projections(runs.folder / "owl"))
    assert len(counted) == 28
    for layer, name, weight in counted:
        assert found.pop((layer, name)) == pytest.approx(100 * (weight == 0).float().mean().item(), abs=1e-4)
    for layer in range(4):
        whole = [weight for of, _, weight in counted if of == layer]
        zeros = sum((weight == 0).sum().item() for weight in whole) / sum(weight.numel() for weight in whole)
        assert found.pop((layer, "layer")) == pytest.approx(100 * zeros, abs=1e-4)
    assert found == {}


def test_the_other_plots_have_the_result_s_numbers(runs):
    page = figures(page_of(runs.folder / "owl"))
    result = runs.results["owl"]
    (trace,) = page["Outlier ratios by layer and projection (% of weights)"]["data"]
    assert [row[0] for row in trace["z"]] == [layer.outliers for layer in result.sparsity.layers]
    errors = {entry["name"]: entry["y"] for entry in page["Output error by layer (relative, no unit)"]["data"]}
    assert errors["mlp.down_proj"] == [
        entry.error for entry in result.sparsity.projections if entry.name == "mlp.down_proj"
    ]
    (memory,) = page["Peak memory of each worker (GiB)"]["data"]
    assert memory["x"] == [worker.peak_bytes / 2**30 for worker in result.workers]
    path = runs.results["mop"].structure.path
    search = figures(page_of(runs.folder / "mop"))["Path of the search (score: perplexity on the calibration data)"]
    layer, narrower, chosen = search["data"]
    assert layer["y"] == [entry.scores["L"] for entry in path]
    assert narrower["y"] == [entry.scores["G"] for entry in path]
    assert chosen["y"] == [path[0].scores["L"], path[1].scores["G"]]
    losses, rate, held_out = figures(page_of(runs.folder / "pipeline"))[
        "Losses of the fine-tuning (nats per token) and learning rate, by step"
    ]["data"]
    recovery = runs.results["recover"].recovery
    assert losses["y"] == [loss.loss for loss in recovery.losses]
    assert rate["y"] == [loss.learning_rate for loss in recovery.losses]
    assert held_out["x"] == [2, 4]
    assert held_out["y"] == [loss.held_out for loss in recovery.losses if loss.held_out is not None]


def test_the_summary_says_what_was_achieved(runs):
    said = cells(page_of(runs.folder / "composite"))
    result = runs.results["composite"]
    assert "model" in said
    left = result.sparsity.left_zero
    zeros = [(int((weight == 0).sum()), weight.numel()) for _, _, weight in projections(runs.folder / "composite")]
    assert left == pytest.approx(sum(count for count, _ in zeros) / sum(weights for _, weights in zeros))
    page = page_of(runs.folder / "composite")
    assert f"<dt>zero, of the weights that are left</dt><dd>{left:.4%}</dd>" in page
    assert (
        f"<dt>removed or zero, of the original&#39;s weights: achieved</dt><dd>{result.sparsity.achieved:.4%}" in page
    )
    (trace,) = figures(page)["Sparsity by layer and projection (% of the weights left)"]["data"]
    assert [row[0] for row in trace["z"]] == [100 * layer.achieved for layer in result.sparsity.layers]
    total = f"{result.seconds['total']:,.1f}"
    assert f'<td>seconds, total</td><td class="number"></td><td class="number">{total}</td>' in page
    assert f"<dt>time</dt><dd>{total} s</dd>" in page
    assert f"{result.sparsity.target:.2%}" in said
    assert f"{result.sparsity.achieved:.4%}" in said
    (measured,) = result.perplexity.values()
    assert f"{measured.before:.3f} → {measured.after:.3f}" in said
    (run_of_it,) = finished_runs(str(runs.folder / "composite"))
    assert run_of_it.seconds == pytest.approx(result.seconds["total"], abs=0.5)
    assert f"{run_of_it.seconds:,.1f} s" in said
    assert "1 on 1 node" in said
    written = json.loads((runs.folder / "composite" / "result.json").read_text())["recipe"]
    assert (written["model"], written["out"], written["eval"]) == ("../model", ".", ["../tokens.npy"])
    assert yaml.safe_dump(written, sort_keys=False) in html.unescape(page_of(runs.folder / "composite"))


def test_no_file_of_an_output_names_a_folder_of_the_machine(runs):
    """Nor do pages; but where the output lies, the model is found from it."""
    files = [*runs.folder.rglob("result.json"), *runs.folder.rglob("report.html"), *runs.folder.rglob("pipeline.json")]
    assert len(files) >= 15
    for file in files:
        text = file.read_text()
        assert str(runs.folder) not in text, file
        assert str(runs.folder.parent) not in text, file
        if file.suffix == ".json":
            assert not re.search(r'"/[^"]', text), file


def test_an_output_may_be_moved(runs, tmp_path, capsys):
    """Status and report say the same of it, and the same command finds it finished, nothing being measured anew."""
    out = tmp_path / "far" / "away" / "moved"
    shutil.copytree(runs.folder / "composite", out)
    for command in ("status", "report"):
        with pytest.raises(SystemExit) as end:
            main([command, str(out)])
        assert end.value.code == 0
    assert "composite" not in capsys.readouterr().out
    before = snapshot(out)
    tokens = [str(runs.folder / "tokens.npy")]
    result = run(runs.folder, out, sparsity=0.5, structured=0.2, eval=tokens, report=True)
    assert snapshot(out) == before
    assert [*result.perplexity.values()] == [*runs.results["composite"].perplexity.values()]
    (moved,) = finished_runs(str(out))
    assert moved.model == "model"


def test_a_run_that_was_cut_off_goes_on_where_its_output_was_moved(runs, tmp_path, dies_at_layer):
    tokens = str(runs.folder / "tokens.npy")
    fields = {"sparsity": 0.5, "eval": [tokens], "propagation": "parallel", "segments": 2}
    dies_at_layer(2)
    with pytest.raises(KeyboardInterrupt):
        run(runs.folder, tmp_path / "cut", **fields)
    out = tmp_path / "a" / "b" / "moved"
    shutil.move(tmp_path / "cut", out)
    moved = run(runs.folder, out, **fields)
    assert [*moved.perplexity] == [tokens]
    with_one_go = run(runs.folder, tmp_path / "one", **fields)
    assert moved.perplexity == with_one_go.perplexity
    assert [file.name for file in out.iterdir() if file.suffix == ".safetensors"]


@pytest.mark.parametrize("out", ["owl", "wanda", "rebuilt", "composite", "interrupted", "pipeline/pruned"])
def test_the_progress_of_a_run_ends_with_all_parts(runs, out):
    """Waves, solutions and files: no part is missing, and none comes twice, also where layers were there already."""
    events = read_events(Folder(str(runs.folder / out), "out"))
    label = "rebuild" if out == "rebuilt" else "prune"
    steps = [event for event in events if event["event"] == "progress" and event.get("label") == label]
    begun = [event for event in steps if event["done"] == 0 and not event["detail"]]
    ended = [event for event in steps if event["done"] == event["total"]]
    assert len(begun) == {"composite": 2, "interrupted": 2}.get(out, 1)
    assert len(ended) == len(begun) - (out == "interrupted")
    assert steps[-1] == ended[-1]
    assert all(event["done"] <= event["total"] for event in events if "total" in event)


def test_what_is_not_there_is_said(runs):
    page = page_of(runs.folder / "wanda")
    assert "Output errors were not measured (--no-measure-error)." in page
    assert "Outlier ratios were not measured: allocation uniform does not need them" in page
    assert "were not measured" not in page_of(runs.folder / "owl")
    interrupted = page_of(runs.folder / "interrupted")
    assert "<dt>time, 2 attempts</dt>" in interrupted
    assert "<td>seconds, total of the last attempt</td>" in interrupted


def test_names_are_text(runs, tmp_path):
    """Whatever a model is called, the page has no other element and no other script for it."""
    name = "<i>&amp;</i"
    make_model(tmp_path / name.replace("/", "_"), "llama")
    run(tmp_path, "out", name.replace("/", "_"), sparsity=0.5, calibration=str(runs.folder / "tokens.npy"), report=True)
    page = page_of(tmp_path / "out")
    assert "<i>" not in page[: page.index("<script>")]
    assert not any("<" in text for text in re.findall(r'<script type="application/json"[^>]*>(.*?)</script>', page))
    assert "&lt;i&gt;&amp;amp;&lt;_i" in page


def test_names_in_plots_are_no_markup(runs, tmp_path):
    """Plotly takes texts for HTML of its own, and a page shows what characters it is given."""
    out = tmp_path / "out"
    shutil.copytree(runs.folder / "owl", out)
    result = json.loads((out / "result.json").read_text())
    result["sparsity"]["projections"][0]["name"] = "mlp.<b>up</b>\x1b[1m\u202e&amp;_proj"
    result["workers"][0]["node"] = "<a href='https://e.org'>node</a>"
    (out / "result.json").write_text(json.dumps(result))
    with (out / "events.jsonl").open("a") as file:
        file.write('{"time": 4e9, "event": "lost", "reason": "<i>\\u001b[2J at /home/me/run.py"}\n')
    write_report(str(out))
    page = page_of(out)
    plots = figures(page)
    shown = "&lt;b&gt;up&lt;/b&gt;\\x1b[1m\\u202e&amp;amp;"
    assert any(shown in name for name in plots["Sparsity by layer and projection (% of weights)"]["data"][0]["x"])
    assert any(shown in entry["name"] for entry in plots["Output error by layer (relative, no unit)"]["data"])
    (memory,) = plots["Peak memory of each worker (GiB)"]["data"]
    assert memory["customdata"] == [["&lt;a href='https://e.org'&gt;node&lt;/a&gt;"]]
    body = page[: page.index("<script>")]
    assert "\x1b" not in body
    assert "\u202e" not in body
    assert "workers lost: &lt;i&gt;\\x1b[2J at .../run.py" in body


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


# -- when it is written ------------------------------------------------------------------------------------------


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
    with pytest.raises(InputError, match="none of the runs measured a perplexity.*; not finished: cut"):
        write_comparison([str(tmp_path / "cut"), str(tmp_path / "cut") + "/"], str(tmp_path / "y.html"))


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
