"""What stands on a report, against the tensors and events that it is about."""

import html
import json
import os
import platform
import re
import shutil
from datetime import UTC, datetime
from importlib.metadata import version

import pytest
import yaml

from shardprune.cli import main
from shardprune.report.events import read_events
from shardprune.report.page.finished_run import finished_runs
from shardprune.report.page.tails import shortest_tails
from shardprune.report.page.write import write_report
from shardprune.report.verdict import verdict
from shardprune.storage.folder import Folder
from tests.report.reading import cells, figures, page_of, projections
from tests.support.running import run
from tests.support.tiny import make_model, snapshot


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


def test_projections_of_the_same_last_name_are_columns_of_their_own(runs, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(runs.folder / "owl", out)
    result = json.loads((out / "result.json").read_text())
    names = {"self_attn.o_proj": "mlp.experts.0.down_proj", "mlp.down_proj": "mlp.experts.1.down_proj"}
    for entry in result["sparsity"]["projections"]:
        entry["name"] = names.get(entry["name"], entry["name"])
    (out / "result.json").write_text(json.dumps(result))
    write_report(str(out))
    for title in (
        "Sparsity by layer and projection (% of weights)",
        "Outlier ratios by layer and projection (% of weights)",
    ):
        (trace,) = figures(page_of(out))[title]["data"]
        assert trace["x"] == ["layer", "q", "k", "v", "0.down", "gate", "up", "1.down"]
        assert [len(row) for row in trace["z"]] == 4 * [8]


def test_the_shortest_tails_tell_names_apart():
    names = ["a.x", "b.x", "c.b.x", "y", "a.z", "a.z"]
    tails = shortest_tails(dict(enumerate(name.split(".") for name in names)))
    assert [".".join(tail) for tail in tails.values()] == ["a.x", "b.x", "c.b.x", "y", "a.z", "a.z"]


def test_the_map_of_a_narrower_model_counts_the_weights_that_are_left(runs, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(runs.folder / "composite", out)
    result = json.loads((out / "result.json").read_text())
    layers = result["sparsity"]["layers"]
    layers[0]["achieved"] += 0.01  # where it is the same everywhere there is no map
    (out / "result.json").write_text(json.dumps(result))
    write_report(str(out))
    (trace,) = figures(page_of(out))["Sparsity by layer and projection (% of the weights left)"]["data"]
    assert [row[0] for row in trace["z"]] == [100 * layer["achieved"] for layer in layers]


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
    rows = dict(re.findall(r'<td>([^<]*)</td><td class="number">[^<]*</td><td class="number">([^<]*)</td>', page))
    assert rows["zero, of the weights that are left"] == f"{left:.4f}"
    assert rows["removed or zero, of the original&#39;s weights"] == f"{result.sparsity.achieved:.4f}"
    assert rows["seconds, total"] == f"{result.seconds['total']:,.1f}"
    assert f"{result.sparsity.target:.2%}" in said
    assert f"<dt>parameters removed</dt><dd>{result.model.removed:.4%}</dd>" in page
    ((name, measured),) = result.perplexity.items()
    assert rows[f"perplexity, {name.rsplit('/', 1)[-1]}"] == f"{measured.after:.3f}"
    (run_of_it,) = finished_runs(str(runs.folder / "composite"))
    assert run_of_it.seconds == pytest.approx(result.seconds["total"], abs=0.5)
    assert rows["workers"] == "1"
    cards = dict(re.findall(r"<dt>([^<]*)</dt><dd>([^<]*)</dd>", page))
    assert not cards.keys() & rows.keys()
    assert not set(cards.values()) & set(rows.values())
    written = json.loads((runs.folder / "composite" / "result.json").read_text())["recipe"]
    assert (written["model"], written["out"], written["eval"]) == ("../model", ".", ["../tokens.npy"])
    assert yaml.safe_dump(written, sort_keys=False) in html.unescape(page_of(runs.folder / "composite"))


def test_a_report_begins_with_what_was_gained_and_lost(runs):
    for out, steps in {"owl": ["owl"], "mop": ["mop"], "pipeline": ["prune", "recover"]}.items():
        body = page_of(runs.folder / out).partition("<body>")[2]
        found = re.findall(r'<h2>[^<]*</h2>\n<p class="verdict">(.*?)</p>', body)
        assert [html.unescape(line) for line in found] == [verdict(runs.results[step]) for step in steps]
        assert found[0].startswith("Gained: ")


def test_a_report_says_when_and_by_what_a_run_was_made(runs):
    events = read_events(Folder(str(runs.folder / "interrupted"), "out"))
    _, last = [event for event in events if event["event"] == "run"]
    assert last["versions"] == {
        "Python": platform.python_version(),
        **{name: version(name) for name in ("shardprune", "torch", "transformers", "ray")},
    }
    date = datetime.fromtimestamp(last["time"], UTC).strftime("%Y-%m-%d %H:%M UTC")
    by = ", ".join(f"{name} {number}" for name, number in last["versions"].items())
    machine = f"{platform.system()} {platform.machine()} with {os.cpu_count()} CPUs"
    said = f"Started {date} with {by}; its driver ran on {machine}."
    assert f'<p class="remark">{said}</p>' in page_of(runs.folder / "interrupted")


def test_the_events_of_an_older_version_have_a_date_alone(runs, tmp_path):
    shutil.copytree(runs.folder / "owl", tmp_path / "owl")
    (tmp_path / "owl" / "events.jsonl").write_text('{"time": 86400, "event": "run", "command": "prune"}\n')
    write_report(str(tmp_path / "owl"))
    assert '<p class="remark">Started 1970-01-02 00:00 UTC.</p>' in page_of(tmp_path / "owl")


@pytest.mark.parametrize("name", ["owl", "mop", "rebuilt"])
def test_the_command_on_the_page_repeats_the_run(runs, name, monkeypatch):
    page = page_of(runs.folder / name)
    (command,) = re.findall(r"<code>(shardprune .*?)</code>", page)
    copied = runs.folder / f"copy-of-{name}"
    copied.mkdir()
    (copied / "recipe.yaml").write_text(html.unescape(re.search(r"<pre>(.*?)</pre>", page, re.DOTALL)[1]))
    monkeypatch.chdir(copied)
    words = command.replace("../again", f"../again-{name}").split()
    with pytest.raises(SystemExit) as end:
        main(words[1:])
    assert end.value.code == 0
    made, again = (list(projections(runs.folder / out)) for out in (name, f"again-{name}"))
    assert made
    assert [place for *place, _ in made] == [place for *place, _ in again]
    assert all(one.equal(other) for (*_, one), (*_, other) in zip(made, again, strict=True))


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
    assert "Sparsity has no map: it is 50.0% in every layer and projection." in page
    owl = page_of(runs.folder / "owl")
    assert "were not measured" not in owl
    assert "has no map" not in owl
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
