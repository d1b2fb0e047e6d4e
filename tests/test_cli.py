"""The command as users call it: one line and exit code 2 for bad input, nothing touched."""

import json
import os
import subprocess
import sys
from importlib.metadata import version

import pytest
import typer
import yaml

from shardprune.cli import app, main
from tests.support.tiny import GROUPED, make_model, make_tokens, snapshot
from tests.support.words import words_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    make_model(folder / "model")
    words_tokenizer().save_pretrained(folder / "model")
    make_tokens(folder / "tokens.npy")
    (folder / "short.txt").write_text("one two three")
    (folder / "occupied").mkdir()
    (folder / "occupied" / "thesis.txt").write_text("chapter one")
    (folder / "broken").mkdir()
    (folder / "broken" / "config.json").write_text((folder / "model" / "config.json").read_text())
    (folder / "broken" / "model.safetensors").write_bytes(b"nothing of the kind, but long enough")
    return folder


def shardprune(*arguments) -> subprocess.CompletedProcess:
    environment = {**os.environ, "COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"}
    command = [sys.executable, "-m", "shardprune", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


@pytest.fixture
def called(monkeypatch, capsys):
    """Run a command in this process, which has to succeed; what it printed."""
    monkeypatch.setenv("COLUMNS", "200")

    def call(*arguments) -> str:
        with pytest.raises(SystemExit) as ended:
            main(list(map(str, arguments)))
        output = capsys.readouterr()
        assert ended.value.code == 0, output.err
        return output.out

    return call


def test_a_run_from_a_recipe_and_options(folder, tmp_path):
    recipe = {
        "calibration": str(folder / "tokens.npy"),
        "samples": 8,
        "seqlen": 24,
        "sparsity": 0.9,
        "backend": "local",
    }
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe))
    done = shardprune(
        *("prune", folder / "model", "--out", tmp_path / "o", "--recipe", tmp_path / "r.yaml"),
        *("--sparsity", "0.5", "--eval", folder / "tokens.npy"),
    )
    assert done.returncode == 0, done.stderr
    assert "perplexity, tokens.npy" in done.stdout
    assert "0.5000" in done.stdout
    assert "prune  layer 4/4" in done.stderr  # plain lines, no bar, where the output is no terminal
    assert "\x1b" not in done.stderr
    stored = json.loads((tmp_path / "o" / "result.json").read_text())
    assert stored["recipe"]["sparsity"] == 0.5
    assert (tmp_path / "o" / "tokenizer.json").exists()


def test_a_checkpoint_is_rebuilt_by_the_command(folder, tmp_path, called):
    common = ("--backend", "local", "--calibration", folder / "tokens.npy", "--samples", "4", "--seqlen", "24")
    called(
        *("prune", folder / "model", "--out", tmp_path / "s", "--method", "wanda", "--sparsity", "0.6", *common),
        *("--allocation", "owl", "--outlier-m", "3", "--outlier-lambda", "0.1"),
    )
    printed = called(
        *("rebuild", folder / "model", tmp_path / "s", "--out", tmp_path / "o", *common),
        *("--rebuild-threshold", "0.3", "--rebuild-granularity", "projection", "--keep-corrected"),
    )
    assert "pairs of weights swapped" in printed
    achieved = json.loads((tmp_path / "s" / "result.json").read_text())["sparsity"]["achieved"]
    assert f"{achieved:.4f}" in printed
    stored = json.loads((tmp_path / "o" / "result.json").read_text())
    assert stored["command"] == "rebuild"
    assert stored["recipe"]["sparse"] == "../s"
    assert stored["recipe"]["keep_corrected"] is True


def test_a_flag_of_a_recipe_can_be_taken_back(folder, tmp_path, called):
    (tmp_path / "r.yaml").write_text("method: wanda\nsparsity: 0.6\nwanda_variant: true\n")
    common = ("--backend", "local", "--calibration", folder / "tokens.npy", "--samples", "4", "--seqlen", "24")
    for flag, expected in ((), True), (("--no-wanda-variant",), False):
        out = tmp_path / f"o{len(flag)}"
        called("prune", folder / "model", "--out", out, "--recipe", tmp_path / "r.yaml", *common, *flag)
        assert json.loads((out / "result.json").read_text())["recipe"]["wanda_variant"] is expected


def test_a_composite_by_the_command(folder, tmp_path, called):
    make_model(tmp_path / "grouped", "llama", configs=GROUPED)
    arguments = ["prune", tmp_path / "grouped", "--out", tmp_path / "o", "--backend", "local", "--eval-windows", "2"]
    arguments += ["--calibration", folder / "tokens.npy", "--samples", "4", "--seqlen", "24"]
    arguments += ["--eval", folder / "tokens.npy"]
    arguments += ["--structured", "0.3", "--score", "amp", "--no-correction", "--sparsity", "0.5", "--method", "wanda"]
    lines = [" ".join(line.split()) for line in called(*arguments).replace("│", " ").splitlines()]
    assert lines[0].startswith("Gained: ")
    for row in (
        "0.3 removed by amp, wanda unstructured,",
        "removed, of the original's weights 0.3000",
        "zero, of the original's weights 0.2",
        "key/value groups of a layer 4 3",
        "neurons of a layer 48 32",
    ):
        assert any(line.startswith(row) for line in lines), row
    recipe = json.loads((tmp_path / "o" / "result.json").read_text())["recipe"]
    assert (recipe["structured"], recipe["score"], recipe["correction"], recipe["sparsity"]) == (0.3, "amp", False, 0.5)


BAD_REBUILDS = {
    "no zeros": ("{model}", "sparse: {model} has no zeros in its projections; give a pruned checkpoint"),
    "another shape": ("{other}", "sparse: tensor "),
    "no checkpoint": ("{short}", "sparse: "),
}


@pytest.mark.parametrize(("sparse", "message"), BAD_REBUILDS.values(), ids=BAD_REBUILDS)
def test_bad_rebuilds_are_one_line_and_exit_code_2(folder, sparse, message, tmp_path, capsys):
    make_model(tmp_path / "other", "llama")
    capsys.readouterr()  # of making it
    names = {"model": folder / "model", "other": tmp_path / "other", "short": folder / "short.txt"}
    arguments = ["rebuild", folder / "model", sparse.format(**names), "--out", tmp_path / "o", "--backend", "local"]
    arguments += ["--calibration", folder / "tokens.npy", "--samples", "4", "--seqlen", "24"]
    with pytest.raises(SystemExit) as ended:
        main(list(map(str, arguments)))
    output = capsys.readouterr()
    assert ended.value.code == 2
    assert output.err.startswith(f"error: {message.format(**names)}")
    assert len(output.err.splitlines()) == 1
    assert not (tmp_path / "o").exists()


BAD = {
    "mixed": (
        ("--sparsity", "0.7", "--pattern", "mixed:8"),
        {},
        "sparsity: 0.7 does not fit the pattern mixed:8: N of 8 over 4 layers cannot average to it",
    ),
    "no room": (("--sparsity", "0.999", "--allocation", "mosaic"), {}, "sparsity: 0.999 leaves mosaic no room"),
    "lambda": (
        ("--sparsity", "0.5", "--allocation", "owl", "--outlier-lambda", "2"),
        {},
        "outlier_lambda: 2.0 is not allowed; use less than or equal to 0.5",
    ),
    "m": (
        ("--sparsity", "0.5", "--allocation", "owl", "--outlier-m", "-1"),
        {},
        "outlier_m: -1.0 is not allowed; use greater than 0",
    ),
    "nothing to remove": (
        ("--structured", "0"),
        {},
        "structured: 0.0 is not allowed; use a number above 0 and below 1",
    ),
    "everything": (("--structured", "1"), {}, "structured: 1.0 is not allowed; use a number above 0 and below 1"),
    "more than everything": (("--structured", "1.5", "--sparsity", "0.5"), {}, "structured: 1.5 is not allowed; use"),
    "no share": (("--structured", "x"), {}, "Invalid value for '--structured'"),
    "more than there is": (
        ("--structured", "0.97"),
        {},
        "structured: 0.97 is more than the model can give: 7,450 parameters of a layer are more than its 48 neurons",
    ),
    "more than there is, then zeros": (
        ("--structured", "0.97", "--sparsity", "0.98"),
        {},
        "structured: 0.97 is more than the model can give",
    ),
    "below structured": (
        ("--structured", "0.3", "--sparsity", "0.2"),
        {},
        "sparsity: 0.2 is less than structured removes, 0.3",
    ),
    "structured and mixed": (
        ("--structured", "0.3", "--sparsity", "0.5", "--pattern", "mixed:8"),
        {},
        "pattern: 'mixed:8' does not go with structured",
    ),
    "score": (("--score", "amp", "--sparsity", "0.5"), {}, "score: 'amp' has no effect without structured"),
    "correction": (("--no-correction", "--sparsity", "0.5"), {}, "correction: False has no effect without structured"),
    "unknown score": (
        ("--structured", "0.3", "--score", "mop"),
        {},
        "score: 'mop' is not allowed; use one of amp, outl",
    ),
    "method without zeros": (
        ("--structured", "0.3", "--method", "wanda"),
        {},
        "method: 'wanda' has no effect without a sparsity or a pattern N:M",
    ),
    "rebuild without zeros": (
        ("--structured", "0.3", "--rebuild", "barber"),
        {},
        "rebuild: 'barber' has no effect without a sparsity or a pattern N:M",
    ),
    "structured and occupied": (("--structured", "0.3", "--sparsity", "0.5"), {"out": "occupied"}, "out: "),
    "missing model": (("--sparsity", "0.5"), {"model": "nowhere"}, "model: 'nowhere' is no directory"),
    "no safetensors": (("--sparsity", "0.5"), {"model": "broken"}, "model: "),
    "sparsity": (("--sparsity", "1.5"), {}, "sparsity: 1.5 is not allowed; use a number from 0 to below 1"),
    "no number": (("--sparsity", "half"), {}, "Invalid value for '--sparsity'"),
    "no sparsity": ((), {}, "sparsity: missing; give a number from 0 to below 1, or a pattern such as 2:4"),
    "pattern": (("--pattern", "4:2"), {}, "pattern: '4:2' is not allowed; use 'unstructured', N:M with"),
    "method": (("--method", "obs", "--sparsity", "0.5"), {}, "method: 'obs' is not allowed; use one of magnitude"),
    "short text": (("--sparsity", "0.5", "--calibration", "{short}"), {}, "calibration: "),
    "replicas": (
        ("--sparsity", "0.5", "--samples", "2", "--replicas", "3"),
        {},
        "replicas: 3 is more than the 2 samples",
    ),
    "shards": (("--sparsity", "0.5", "--shards", "5"), {}, "shards: 5 is more than the model's 4 layers"),
    "occupied": (("--sparsity", "0.5"), {"out": "occupied"}, "out: "),
    "unknown option": (("--sparsity", "0.5", "--sparsty", "1"), {}, "No such option: --sparsty"),
    "recipe field": (
        ("--recipe", "{recipe}"),
        {},
        "sparsty: no field of a recipe has this name; did you mean sparsity?",
    ),
}


@pytest.mark.parametrize(("options", "places", "message"), BAD.values(), ids=BAD)
def test_bad_input_is_one_line_and_exit_code_2(folder, options, places, message, tmp_path, capsys):
    (tmp_path / "r.yaml").write_text("sparsty: 0.5\n")
    model = {"nowhere": "nowhere"}.get(places.get("model"), folder / places.get("model", "model"))
    out = folder / places["out"] if "out" in places else tmp_path / "o"
    before = snapshot(folder)
    given = [option.format(short=folder / "short.txt", recipe=tmp_path / "r.yaml") for option in options]
    if "--calibration" not in given:
        given += ["--calibration", folder / "tokens.npy"]
    if "--samples" not in given:
        given += ["--samples", "4"]
    with pytest.raises(SystemExit) as ended:
        main(list(map(str, ("prune", model, "--out", out, "--backend", "local", "--seqlen", "24", *given))))
    output = capsys.readouterr()
    assert ended.value.code == 2
    assert output.out == ""
    assert output.err.startswith(f"error: {message}")
    assert len(output.err.splitlines()) == 1
    assert snapshot(folder) == before
    assert not (tmp_path / "o").exists()


def test_bad_input_ends_the_process_with_code_2(folder, tmp_path):
    done = shardprune("prune", folder / "broken", "--out", tmp_path / "o", "--sparsity", "0.5")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == f"error: model: {folder / 'broken'}/model.safetensors is not a safetensors file\n"


HEAVY = ("torch", "ray", "transformers", "plotly")
REFUSED = {
    "demo": ("--shards", "0"),
    "prune": ("m", "--out", "o", "--sparsity", "2"),
    "rebuild": ("m", "s", "--out", "o", "--samples", "0"),
    "mop": ("m", "--out", "o", "--remove", "2"),
    "experts": ("m", "--out", "o", "--remove", "2"),
    "recover": ("m", "--out", "o", "--data", "alpaca", "--length", "1"),
    "evaluate": ("m", "--perplexity", "nowhere"),
    "pipeline": ("nowhere.yaml", "--out", "o"),
    "plan": ("m", "--gpus", "0"),
    "plan-recovery": ("m", "--gpus", "3"),
    "slurm": ("nowhere.yaml",),
    "status": ("o", "--jsn"),
    "check": ("o", "--jsn"),
    "report": ("o", "--file", "page.html"),
    "export": ("m", "--to", "o", "--format", "zip"),
}


def test_every_command_is_refused_something_here():
    assert REFUSED.keys() == typer.main.get_command(app).commands.keys()


@pytest.mark.parametrize(("command", "words"), REFUSED.items(), ids=REFUSED)
def test_bad_input_is_refused_before_anything_heavy_is_imported(command, words, tmp_path):
    code = (
        "import atexit, sys\n"
        f"atexit.register(lambda: print(*(name for name in {HEAVY} if name in sys.modules)))\n"
        f"from shardprune.cli import main; main({[command, *words]})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert done.stdout.split() == []


def test_stories_import_neither_what_draws_reports_nor_what_only_some_runs_use():
    code = (
        "import gc, sys\n"
        "from shardprune.recipes.commands import COMMANDS\n"
        "for command in COMMANDS.values():\n    command.story\n"
        "print(gc.isenabled(), gc.get_freeze_count() > 100_000)\n"
        "print(*(name for name in ('plotly', 'ray', 'datasets', 'lm_eval', 'pandas') if name in sys.modules))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "True True\n\n"


def test_the_version_is_printed(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"shardprune {version('shardprune')}\n"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["prune", "m", "--sparsity", "0.5"],
            "out: missing; give --out, or out in a recipe; see shardprune prune --help",
        ),
        (["prune", "--out", "o", "--sparsity", "0.5"], "model: missing; give MODEL, or model in a recipe"),
        (
            ["pipeline", "{}", "--out", "o"],
            "model: missing; give --model, or model in a recipe; see shardprune pipeline",
        ),
        (["plan"], "model: missing; give MODEL, or model in a recipe; see shardprune plan --help"),
    ],
)
def test_what_is_missing_says_how_to_give_it(words, said, tmp_path, capsys):
    (tmp_path / "r.yaml").write_text("prune: {sparsity: 0.5}\nevaluate: {perplexity: stdlib}\n")
    with pytest.raises(SystemExit) as ended:
        main([word.replace("{}", str(tmp_path / "r.yaml")) for word in words])
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith(f"error: {said}")


@pytest.mark.parametrize("command", ["prune", "plan"])
def test_a_terminal_is_told_what_begins_before_anything_heavy_is_imported(command, tmp_path):
    """Elsewhere nothing is: there, bad input is one line."""
    more = ["--out", "o", "--sparsity", "0.5"] if command == "prune" else []
    code = (
        "import sys\n"
        "class Told:\n"
        "    def write(self, text):\n"
        f"        print([text, [name for name in {HEAVY} if name in sys.modules]], file=sys.__stderr__)\n"
        "    def flush(self): pass\n"
        "    def isatty(self): return True\n"
        "sys.stderr = Told()\n"
        f"from shardprune.cli import main; main({[command, 'no/where', *more]})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.stderr.splitlines()[0] == str([f"shardprune {version('shardprune')}: {command} no/where", []])
