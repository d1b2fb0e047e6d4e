"""Models that change while a run reads them, or between its attempts: no output is a mixture of two."""

import os
import shutil

import pytest

from shardprune.cli import main
from shardprune.errors import InputChanged, InputError
from shardprune.report.progress import Reporter
from tests.evaluation.material import evaluated
from tests.support.running import rebuild_run, run, search_run
from tests.support.tiny import differing, make_model

FILE = "model.safetensors"


@pytest.fixture
def model(folder, tmp_path):
    """A model of the test's own."""
    return shutil.copytree(folder / "model", tmp_path / "model")


@pytest.fixture(scope="module")
def other(folder):
    """A model file of the same shapes and size with other weights."""
    make_model(folder / "other", "llama-3.1", seed=1)
    assert (folder / "other" / FILE).stat().st_size == (folder / "model" / FILE).stat().st_size
    return folder / "other" / FILE


@pytest.fixture(scope="module")
def plain(folder):
    """What an undisturbed run writes."""
    run(folder, "plain", sparsity=0.5)
    return folder / "plain"


def renamed_over(model, other):
    shutil.copy(other, model / "new")
    os.replace(model / "new", model / FILE)


def written_into(model, other):
    (model / FILE).write_bytes(other.read_bytes())


def truncated(model, other):
    os.truncate(model / FILE, 20_000)


def removed(model, other):
    (model / FILE).unlink()


def config_changed(model, other):
    (model / "config.json").write_text((model / "config.json").read_text() + "\n")


CHANGES = [renamed_over, written_into, truncated, removed, config_changed]


class Meddling(Reporter):
    """A reporter that changes something when a step begins."""

    def __init__(self, label, change):
        super().__init__(quiet=True)
        self.label, self.change = label, change

    def step(self, label, parts):
        if label == self.label:
            self.change()
        return super().step(label, parts)


def assert_refused(caught, out, field="model"):
    text = str(caught.value)
    assert text.startswith(f"{field}: the model changed under the run: ")
    assert "\n" not in text
    assert not (out / "result.json").exists()


@pytest.mark.parametrize("weights", ["streamed", "resident"])
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_model_that_changes_while_it_is_pruned(folder, model, other, tmp_path, change, weights):
    meddling = Meddling("prune", lambda: change(model, other))
    with pytest.raises(InputChanged) as caught:
        run(folder, tmp_path / "out", model=model, reporter=meddling, sparsity=0.5, weights=weights)
    assert_refused(caught, tmp_path / "out")
    if weights == "streamed" and change is not config_changed:  # not one layer was made of the other model
        assert not list((tmp_path / "out").glob("*.safetensors"))


def test_a_sparse_model_that_changes_while_its_masks_are_rebuilt(folder, plain, tmp_path, other, monkeypatch):
    sparse = shutil.copytree(plain, tmp_path / "sparse")
    monkeypatch.setattr("tests.support.running.Reporter", lambda quiet: Meddling("rebuild", change))

    def change():
        os.replace(shutil.copy(plain / "model-00004-of-00005.safetensors", tmp_path), sparse / next_layer)

    next_layer = "model-00003-of-00005.safetensors"
    with pytest.raises(InputChanged) as caught:
        rebuild_run(folder, tmp_path / "out", sparse, weights="streamed")
    assert_refused(caught, tmp_path / "out", "sparse")


def test_a_model_that_changes_under_a_search_or_an_evaluation(folder, model, other, tmp_path, monkeypatch):
    copied = shutil.copy2(model / FILE, tmp_path / "first")
    monkeypatch.setattr(
        "tests.support.running.Reporter", lambda quiet: Meddling("iteration 1", lambda: renamed_over(model, other))
    )
    with pytest.raises(InputChanged) as caught:
        search_run(folder, tmp_path / "mop", model=model, path="L", depth_rule="third-last")
    assert_refused(caught, tmp_path / "mop")
    os.replace(copied, model / FILE)
    monkeypatch.setattr("tests.evaluation.material.QUIET", Meddling("perplexity", lambda: renamed_over(model, other)))
    with pytest.raises(InputChanged, match="^model: the model changed under the run: "):
        evaluated(model, perplexity=str(folder / "other.npy"), seqlen=24, wave=4, weights="streamed")


def test_the_command_says_it_in_one_line(folder, model, other, tmp_path, monkeypatch, capsys):
    step = Reporter.step

    def meddling(self, label, parts):
        if label == "prune":
            renamed_over(model, other)
        return step(self, label, parts)

    monkeypatch.setattr(Reporter, "step", meddling)
    words = ["--calibration", f"{folder}/tokens.npy", "--samples", "12", "--seqlen", "24", "--backend", "local"]
    with pytest.raises(SystemExit) as ended:
        main(["prune", str(model), "--out", str(tmp_path / "out"), "--sparsity", "0.5", "--no-report", *words])
    assert ended.value.code == 1
    assert capsys.readouterr().err.strip().splitlines()[-1] == (
        f"error: model: the model changed under the run: {model}/{FILE} is not the file that it was when the run first "
        "read it; give the model back as it was, and the same command goes on"
    )


# -- between attempts ------------------------------------------------------------------------------------------


def flip_outside_the_samples(model, tensor="model.layers.3.mlp.up_proj.weight"):
    """Change one weight that no sample of the identity covers."""
    from shardprune.model.checkpoint import Checkpoint

    entry, checkpoint = Checkpoint(str(model)).entries[tensor], Checkpoint(str(model))
    identity = checkpoint.identity()
    with (model / FILE).open("r+b") as file:
        file.seek(entry.start + 8)
        file.write(b"\x01\x02\x03\x3d")
    assert Checkpoint(str(model)).identity() == identity


def cut_off(folder, model, out, dies_at_layer, **fields):
    dies_at_layer(2)
    with pytest.raises(KeyboardInterrupt):
        run(folder, out, model=model, sparsity=0.5, **fields)


def test_a_tensor_that_changes_between_attempts(folder, model, tmp_path, dies_at_layer):
    fields = {"eval": (str(folder / "other.npy"),), "weights": "streamed"}
    cut_off(folder, model, tmp_path / "out", dies_at_layer, **fields)
    flip_outside_the_samples(model)
    with pytest.raises(InputChanged, match=f"{FILE} holds another model.layers.3.mlp.up_proj.weight than when the run"):
        run(folder, tmp_path / "out", model=model, sparsity=0.5, **fields)


def test_a_file_that_changes_between_attempts_before_it_was_read(folder, model, tmp_path, dies_at_layer):
    cut_off(folder, model, tmp_path / "out", dies_at_layer, weights="streamed")
    flip_outside_the_samples(model)
    reason = rf"^model: {model}/{FILE} is not the file with which the run began .*lm_head.weight was not read before"
    with pytest.raises(InputError, match=reason):
        run(folder, tmp_path / "out", model=model, sparsity=0.5, weights="streamed")


def moved_with_its_times(model):
    shutil.copytree(model, model.parent / "copy", copy_function=shutil.copy2)
    shutil.rmtree(model)
    (model.parent / "copy").rename(model)


def touched(model):
    os.utime(model / FILE)


@pytest.mark.parametrize("change", [moved_with_its_times, touched], ids=lambda change: change.__name__)
def test_the_same_model_goes_on(folder, model, plain, tmp_path, dies_at_layer, change):
    # Of a file with another time, all must have been read before.
    fields = {"eval": (str(folder / "other.npy"),)} if change is touched else {}
    cut_off(folder, model, tmp_path / "out", dies_at_layer, weights="streamed", **fields)
    change(model)
    run(folder, tmp_path / "out", model=model, sparsity=0.5, weights="streamed", **fields)
    assert differing(plain, tmp_path / "out") == []
