"""Several steps as one job, in this process: the same as the steps alone, resumed where it was cut off."""

import json
import shutil

import pytest
import yaml

from shardprune import PipelineRecipe, pipeline
from shardprune.cli import main
from shardprune.errors import InputError
from shardprune.report.progress import Reporter
from tests.support.running import run
from tests.support.tiny import differing, snapshot

STEPS = ("prune", "recover", "evaluate")


def sections(folder, **changes):
    """A recipe with a section for each step; `changes` are merged into the sections of their names."""
    tokens = str(folder / "tokens.npy")
    recipe = {
        "model": str(folder / "model"),
        "backend": "local",
        "threads": 1,
        "prune": {"sparsity": 0.5, "calibration": tokens, "samples": 12, "seqlen": 24, "wave": 4},
        "recover": {"data": tokens, "length": 24, "steps": 2, "batch": 4, "keep_sparsity": True, "zero": 1},
        "evaluate": {"perplexity": tokens, "seqlen": 24},
    }
    for name, change in changes.items():
        recipe[name] = {**recipe[name], **change} if isinstance(change, dict) and name in recipe else change
    return {name: value for name, value in recipe.items() if value is not None}


def carry_out(folder, out, **changes):
    return pipeline(PipelineRecipe.checked({"out": str(out), **sections(folder, **changes)}), Reporter(quiet=True))


@pytest.fixture(scope="module")
def whole(folder):
    """The output of a pipeline that nothing disturbed, and its results."""
    return folder / "whole", carry_out(folder, folder / "whole")


def test_steps_are_those_of_their_own_commands(folder, whole, tmp_path):
    out, results = whole
    assert tuple(results) == STEPS
    alone = run(folder, tmp_path / "alone", sparsity=0.5)
    assert differing(tmp_path / "alone", out / "pruned") == []
    assert results["prune"].fingerprint == alone.fingerprint
    recovery = results["recover"].recovery
    assert recovery.zeros_kept == recovery.zeros_before > 0
    assert results["recover"].recipe["model"] == str(out / "pruned")
    kept = json.loads((out / "recovered" / "result.json").read_text())
    assert kept["command"] == "recover"
    (measured,) = kept["evaluation"]["perplexity"].values()
    assert measured["value"] == next(iter(results["evaluate"].evaluation.perplexity.values())).value
    assert json.loads((out / "pipeline.json").read_text())["steps"] == list(STEPS)


def test_a_finished_pipeline_does_nothing(folder, whole):
    out, _ = whole
    before = snapshot(out)
    again = carry_out(folder, out)
    assert tuple(again) == ("prune", "recover")
    assert snapshot(out) == before


@pytest.mark.parametrize("spelled", ["./model", "{}/model/", "{}/./model", "file://{}/model", "{}/model"])
def test_a_model_and_texts_may_be_spelled_in_other_ways(folder, tmp_path, monkeypatch, spelled):
    monkeypatch.chdir(folder)
    shared = {"model": spelled.format(folder), "recover": None, "evaluate": {"perplexity": "./tokens.npy"}}
    for steps in (("prune", "evaluate"), ("prune",)):
        assert tuple(carry_out(folder, tmp_path / "o", **shared)) == steps
    (tmp_path / "moved").mkdir()
    shutil.move(tmp_path / "o", tmp_path / "moved" / "o")
    with pytest.raises(InputError, match="out: .* holds another pipeline"):  # its model does not lie beside it
        carry_out(folder, tmp_path / "moved" / "o", **shared)


def test_an_output_on_other_storage_is_gone_on_with(folder):
    out, shared = "memory://pipeline", {"recover": None}
    for steps in (("prune", "evaluate"), ("prune",)):
        assert tuple(carry_out(folder, out, **shared)) == steps


def test_where_it_works_may_change_what_it_does_may_not(folder, whole):
    out, results = whole
    elsewhere = {"recover": {"checkpoint_every": 7, "threads": 2}, "prune": {"shards": 2}, "evaluate": {"shards": 2}}
    assert carry_out(folder, out, **elsewhere)["recover"].recovery == results["recover"].recovery
    with pytest.raises(InputError, match="out: .*pruned holds another run"):
        carry_out(folder, out, prune={"sparsity": 0.6})
    with pytest.raises(InputError, match="out: .*recovered holds another run"):
        carry_out(folder, out, recover={"steps": 5})
    again = carry_out(folder, out, evaluate={"windows": 1})
    assert next(iter(again["evaluate"].evaluation.perplexity.values())).windows == 1


@pytest.mark.parametrize("cut_off", STEPS)
def test_it_resumes_at_the_step_that_was_cut_off(folder, whole, tmp_path, monkeypatch, cut_off):
    def dies(recipe, reporter):
        raise KeyboardInterrupt

    monkeypatch.setattr(f"shardprune.commands.{cut_off}.{cut_off}", dies)
    with pytest.raises(KeyboardInterrupt):
        carry_out(folder, tmp_path / "o")
    monkeypatch.undo()
    assert (tmp_path / "o" / "pruned").exists() is (cut_off != "prune")
    assert tuple(carry_out(folder, tmp_path / "o")) == STEPS
    assert differing(whole[0] / "recovered", tmp_path / "o" / "recovered") == []


def test_a_model_that_was_made_anew_is_evaluated_anew(folder, tmp_path):
    carry_out(folder, tmp_path / "o")
    shutil.rmtree(tmp_path / "o" / "recovered")
    again = carry_out(folder, tmp_path / "o", recover={"steps": 3})
    kept = json.loads((tmp_path / "o" / "recovered" / "result.json").read_text())
    (written,), (found,) = (
        entry.values() for entry in (kept["evaluation"]["perplexity"], again["evaluate"].evaluation.perplexity)
    )
    assert written["value"] == found.value


def test_mop_instead_of_prune_and_no_recovery(folder, tmp_path):
    search = {"path": "L", "calibration": str(folder / "tokens.npy"), "samples": 4, "seqlen": 24, "scores": False}
    results = carry_out(folder, tmp_path / "o", prune=None, mop=search, recover=None)
    assert tuple(results) == ("mop", "evaluate")
    assert "evaluation" in json.loads((tmp_path / "o" / "pruned" / "result.json").read_text())


BAD = {
    "neither": ({"prune": None}, "prune: give one of the sections prune, mop and experts"),
    "both": ({"mop": {"path": "L"}}, "prune: give one of the sections prune, mop and experts"),
    "nothing after": ({"recover": None, "evaluate": None}, "recover: missing; give a section recover, evaluate, or"),
    "an option of a step": ({"prune": {"sparsity": 2}}, "prune.sparsity: 2 is not allowed"),
    "a name": ({"recover": {"lora_rnk": 2}}, "recover.lora_rnk: no field of a recipe has this name; did you mean"),
    "the model of a step": ({"recover": {"model": "m"}}, "recover.model: stands beside the steps"),
    "no zeros": (
        {"prune": {"sparsity": None, "structured": 0.2}},
        "recover.keep_sparsity: the step before leaves no zeros to keep",
    ),
    "positions": ({"prune": {"seqlen": 100}}, "prune.seqlen: 100 is more than the model's 64 positions"),
    "structures": (
        {"prune": {"structured": 0.001}},
        "prune.structured: 0.001 is less than half of what goes together in a layer",
    ),
    "positions of mop": (
        {"prune": None, "mop": {"path": "L", "seqlen": 100}, "recover": {"keep_sparsity": False}},
        "mop.seqlen: 100 is more than the model's 64 positions",
    ),
    "data": ({"recover": {"data": "nowhere.txt"}}, "recover.data: 'nowhere.txt' does not exist"),
    "length": ({"recover": {"length": 100}}, "recover.length: 100 is more than the model's 64 positions"),
    "push": ({"recover": {"push": "someone/half"}}, "recover.push: 'someone/half' cannot be reached: HF_HUB_OFFLINE"),
    "push of the first": (
        {"prune": {"push": "someone/half"}},
        "prune.push: 'someone/half' cannot be reached: HF_HUB_OFFLINE",
    ),
    "source": ({"evaluate": {"perplexity": "nowhere.txt"}}, "evaluate.perplexity: 'nowhere.txt' does not exist"),
    "seqlen": ({"evaluate": {"seqlen": 100}}, "evaluate.seqlen: 100 is more than the model's 64 positions"),
}


@pytest.mark.parametrize(("changes", "message"), BAD.values(), ids=BAD)
def test_what_cannot_work_is_found_before_the_first_step(folder, tmp_path, changes, message):
    with pytest.raises(InputError) as error:
        carry_out(folder, tmp_path / "o", **changes)
    assert str(error.value).startswith(message)
    assert not (tmp_path / "o").exists()


def test_other_outputs_are_not_overwritten(folder, whole, tmp_path):
    with pytest.raises(InputError, match="out: .* holds another pipeline"):
        carry_out(folder, whole[0], evaluate=None)
    with pytest.raises(InputError, match="out: .* holds this pipeline already"):
        carry_out(folder, whole[0], resume=False)
    with pytest.raises(InputError, match="out: .* is not empty and holds a run"):
        carry_out(folder, whole[0] / "pruned")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="out: .* is not empty and holds something else"):
        carry_out(folder, tmp_path)


def test_the_command_reads_a_file(folder, whole, tmp_path, capsys):
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(sections(folder)))
    with pytest.raises(SystemExit) as done:
        main(["pipeline", str(file), "--out", str(whole[0])])
    assert done.value.code == 0
    assert "recovered is finished already" in capsys.readouterr().err
    with pytest.raises(SystemExit) as done:
        main(["pipeline", str(file), "--out", str(tmp_path / "o"), "--model", str(tmp_path / "nowhere")])
    assert done.value.code == 2
    assert capsys.readouterr().err.startswith("error: model: ")
