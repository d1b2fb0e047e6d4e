"""A search whose kept iterations are recovered and evaluated, in this process: each as by the commands alone."""

import json

import pytest

from shardprune import EvaluateRecipe, PipelineRecipe, RecoverRecipe, evaluate, pipeline, recover
from shardprune.commands.check import check
from shardprune.errors import InputError
from shardprune.evaluation.latency import original_of
from shardprune.report.page.finished_run import finished_runs
from shardprune.report.page.write import write_comparison
from shardprune.report.progress import Reporter
from shardprune.report.status import status_of
from tests.support.tiny import differing, snapshot

QUIET = Reporter(quiet=True)
KEPT = ("iteration-01", "iteration-02")
# The third iteration is the last one.
NAMES = ("mop", *(f"{step} {kept}" for kept in KEPT for step in ("recover", "evaluate")), "recover", "evaluate")


def sections(folder, **changes):
    """A recipe with a section for each step; `changes` are merged into the sections of their names."""
    tokens = str(folder / "tokens.npy")
    recipe = {
        "model": str(folder / "model"),
        "backend": "local",
        "threads": 1,
        "mop": {
            **{"path": "LGL", "mlp_only": True, "scores": False, "calibration": tokens, "samples": 4, "seqlen": 24},
            **{"keep": "1,2,3", "each": True},
        },
        "recover": {"data": tokens, "length": 24, "steps": 2, "batch": 4, "zero": 1, "lora_rank": 4},
        "evaluate": {"perplexity": tokens, "seqlen": 24},
    }
    for name, change in changes.items():
        recipe[name] = {**recipe[name], **change} if isinstance(change, dict) and name in recipe else change
    return {name: value for name, value in recipe.items() if value is not None}


def carry_out(folder, out, **changes):
    return pipeline(PipelineRecipe.checked({"out": str(out), **sections(folder, **changes)}), QUIET)


@pytest.fixture(scope="module")
def whole(folder):
    """The output of a pipeline that nothing disturbed, and its results."""
    return folder / "each", carry_out(folder, folder / "each")


def perplexity(result) -> float:
    (measured,) = result.evaluation.perplexity.values()
    return measured.value


def test_each_is_what_the_commands_make_of_the_kept_iteration(folder, whole, tmp_path):
    out, results = whole
    assert tuple(results) == NAMES
    for kept, layers in zip(KEPT, (3, 3), strict=True):
        made = out / f"recovered-{kept}"
        assert json.loads((made / "config.json").read_text())["num_hidden_layers"] == layers
        values = {"model": str(out / "pruned" / kept), "out": str(tmp_path / kept), "backend": "local", "threads": 1}
        recover(RecoverRecipe.checked({**values, **sections(folder)["recover"]}), QUIET)
        assert differing(made, tmp_path / kept) == []
        fields = {"model": str(tmp_path / kept), "backend": "local", "threads": 1, **sections(folder)["evaluate"]}
        alone = evaluate(EvaluateRecipe.checked(fields), QUIET)
        assert perplexity(results[f"evaluate {kept}"]) == perplexity(alone)
        held = json.loads((made / "result.json").read_text())
        (measured,) = held["evaluation"]["perplexity"].values()
        assert measured["value"] == perplexity(alone)
        assert (made / "report.html").exists()
    found = [perplexity(results[name]) for name in NAMES if name.startswith("evaluate")]
    assert len({*found}) == 3
    assert json.loads((out / "pipeline.json").read_text())["recipe"]["mop"]["each"] is True


def test_the_last_iteration_is_recovered_once(folder, whole):
    out, results = whole
    assert not (out / "recovered-iteration-03").exists()
    assert differing(out / "pruned", out / "pruned" / "iteration-03") == []
    assert results["recover"].recipe["model"] == str(out / "pruned")


def test_report_status_and_check_know_all_models(whole, tmp_path):
    out, _ = whole
    folders = ["pruned", *(f"recovered-{kept}" for kept in KEPT), "recovered"]
    places = [f"{out}/{name}" for name in folders]
    assert [run.folder for run in finished_runs(str(out))] == places
    assert [one.folder for one in status_of(str(out))] == places
    verdicts = check(str(out))
    assert [verdict.url for verdict in verdicts] == places
    assert not any(verdict.faults for verdict in verdicts)
    page = (out / "report.html").read_text()
    assert all(f"<dd>{name}</dd>" in page for name in folders)
    (tmp_path / "other").mkdir()
    write_comparison([str(out), str(out / "recovered-iteration-01")], str(tmp_path / "page.html"))
    models = json.loads((tmp_path / "page.json").read_text())["models"]
    removed = {model["run"]: model["removed"] for model in models}
    assert removed.keys() == {f"each/{name}" for name in folders if name != "pruned"}
    shares = [removed[f"each/{name}"] for name in folders[1:]]
    assert 0 < shares[0] < shares[1] < shares[2]
    methods = {model["method"] for model in models}
    assert all(method.startswith("mop") and method.count("recover") == 1 for method in methods)


def test_the_original_of_a_kept_iteration_is_that_of_the_search(folder, whole):
    out, _ = whole
    assert original_of(str(out / "recovered-iteration-01")) == str(folder / "model")


def test_a_finished_pipeline_does_nothing(folder, whole):
    out, _ = whole
    before = snapshot(out)
    again = carry_out(folder, out)
    assert tuple(again) == tuple(name for name in NAMES if not name.startswith("evaluate"))
    assert snapshot(out) == before


@pytest.mark.parametrize(
    ("command", "count", "there"),
    [
        ("recover", 2, {"recovered-iteration-01"}),
        pytest.param("evaluate", 2, {f"recovered-{kept}" for kept in KEPT}, marks=pytest.mark.long),
    ],
)
def test_it_resumes_at_the_iteration_that_was_cut_off(folder, whole, tmp_path, monkeypatch, command, count, there):
    module = f"shardprune.commands.{command}.{command}"
    story, calls = {"recover": recover, "evaluate": evaluate}[command], []

    def counted(recipe, reporter):
        calls.append(recipe.model)
        if len(calls) == count:
            raise KeyboardInterrupt
        return story(recipe, reporter)

    with monkeypatch.context() as patched:
        patched.setattr(module, counted)
        with pytest.raises(KeyboardInterrupt):
            carry_out(folder, tmp_path / "o")
    assert {path.name for path in (tmp_path / "o").glob("recovered*")} == there
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "o").glob("recovered-*/*.safetensors")}
    assert written
    results = carry_out(folder, tmp_path / "o")
    assert "evaluate iteration-01" not in results  # which was done before
    assert {path: path.stat().st_mtime_ns for path in written} == written
    for name in ("recovered", *(f"recovered-{kept}" for kept in KEPT)):
        assert differing(whole[0] / name, tmp_path / "o" / name) == []
    assert perplexity(results["evaluate"]) == perplexity(whole[1]["evaluate"])


def test_each_training_has_a_state_of_its_own(folder, tmp_path, monkeypatch):
    """The state of the one that was cut off stays while those before it are found to be finished."""
    from shardprune.recovery.checkpoints import Checkpoints

    save, calls = Checkpoints.save, []

    def dying(self, *arguments):
        save(self, *arguments)
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt

    changes = {"recover": {"state": str(tmp_path / "state")}, "evaluate": None}
    with monkeypatch.context() as patched:
        patched.setattr(Checkpoints, "save", dying)
        with pytest.raises(KeyboardInterrupt):
            carry_out(folder, tmp_path / "o", **changes)
    assert [path.name for path in (tmp_path / "state").iterdir()] == ["iteration-02"]
    trained = []
    monkeypatch.setattr(Checkpoints, "save", lambda self, *given: trained.append(given) or save(self, *given))
    results = carry_out(folder, tmp_path / "o", **changes)
    assert tuple(results) == tuple(name for name in NAMES if not name.startswith("evaluate"))
    assert len(trained) == 1  # of the last model
    assert not (tmp_path / "state").exists()


def test_layers_that_are_trained_at_the_end_are_not_those_of_the_last_iteration(folder, tmp_path):
    search = {"path": "LL", "keep": "2", "reconstruct": 2, "samples": 8}
    results = carry_out(folder, tmp_path / "o", mop=search, evaluate=None)
    assert tuple(results) == ("mop", "recover iteration-02", "recover")
    assert differing(tmp_path / "o" / "recovered", tmp_path / "o" / "recovered-iteration-02") != []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mop": {"each": "some"}}, "mop.each: 'some' is not allowed; use true or false"),
        ({"mop": {"keep": None}}, "mop.each: True has no effect without keep"),
        ({"recover": None}, "mop.each: True has no effect without a section recover"),
        ({"recover": {"push": "me/model"}}, "recover.push: 'me/model' is one repository for several models"),
        ({"mop": None, "prune": {"sparsity": 0.5, "each": True}}, "prune.each: no field of a recipe has this name"),
        ({"recover": {"each": True}}, "recover.each: no field of a recipe has this name"),
    ],
)
def test_what_makes_no_sense_is_refused(folder, tmp_path, changes, message):
    with pytest.raises(InputError) as error:
        carry_out(folder, tmp_path / "o", **changes)
    assert str(error.value).startswith(message)
    assert not (tmp_path / "o").exists()
