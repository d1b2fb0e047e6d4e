"""Searches that are cut off go on after their last iteration, and leave nothing behind."""

import functools
import json
from functools import cache

import pytest

from shardprune.model.checkpoint import Checkpoint
from shardprune.shard.mop_worker import MopWorker
from shardprune.storage.folder import Folder
from tests.support.running import search_run as search
from tests.support.tiny import (
    differing,
)


@pytest.fixture
def dies_in(monkeypatch):
    """Make a verb of the worker fail, once, when it is called for the `count`th time."""

    def arm(verb: str, count: int) -> None:
        whole_verb, calls = getattr(MopWorker, verb), []

        @functools.wraps(whole_verb)
        def failing(self, *args):
            calls.append(args)
            if len(calls) == count:
                monkeypatch.setattr(MopWorker, verb, whole_verb)
                raise KeyboardInterrupt
            return whole_verb(self, *args)

        monkeypatch.setattr(MopWorker, verb, failing)

    return arm


INTERRUPTIONS = [
    ("kl", "narrow", 2),
    pytest.param("kl", "narrow", 9, marks=pytest.mark.long),
    ("kl", "adopt", 3),
    ("perplexity", "write", 6),
    pytest.param("perplexity", "narrow", 9, marks=pytest.mark.long),
    ("cosine", "judge", 8),
    pytest.param("given", "remove", 2, marks=pytest.mark.long),
    ("given", "write", 2),
    pytest.param("given", "write", 5, marks=pytest.mark.long),
]


def search_by(folder, chosen_by, out):
    way = {"path": "LGL"} if chosen_by == "given" else {"remove": 0.6, "criterion": chosen_by}
    return search(folder, out, **way, keep="2", shards=2, eval=(str(folder / "other.npy"),))


@pytest.fixture(scope="module")
def undisturbed_by(folder):
    """The output and the result of a search that nothing interrupts, by what chooses its path."""
    return cache(lambda chosen_by: (folder / chosen_by, search_by(folder, chosen_by, folder / chosen_by)))


@pytest.mark.parametrize(("chosen_by", "verb", "count"), INTERRUPTIONS)
def test_an_interrupted_search_goes_on_after_its_last_iteration(
    folder, undisturbed_by, chosen_by, verb, count, dies_in, tmp_path
):
    out, undisturbed = undisturbed_by(chosen_by)
    dies_in(verb, count)
    with pytest.raises(KeyboardInterrupt):
        search_by(folder, chosen_by, tmp_path / "o")
    state = json.loads((tmp_path / "o" / "run.json").read_text())
    resumed = search_by(folder, chosen_by, tmp_path / "o")
    assert resumed.structure == undisturbed.structure
    assert resumed.perplexity == undisturbed.perplexity
    found = [entry.model_dump(mode="json", exclude_none=True) for entry in resumed.structure.path]
    assert found[: len(state["path"])] == state["path"]
    assert differing(out, tmp_path / "o") == []
    assert differing(out / "iteration-02", tmp_path / "o" / "iteration-02") == []
    assert {path.name for path in (tmp_path / "o").iterdir()} == {path.name for path in out.iterdir()}


def test_no_iteration_reads_the_model_again(folder, monkeypatch, tmp_path):
    reads = []
    read = Checkpoint.read
    monkeypatch.setattr(Checkpoint, "read", lambda self, name: reads.append(name) or read(self, name))
    search(folder, tmp_path / "o", path="GLGL", keep="2", shards=2)
    of_layers = [name for name in reads if ".layers." in name]
    assert len(of_layers) == len(set(of_layers)) == 4 * 9


def test_saved_layers_that_a_kill_has_left_go_with_the_next_attempt(folder, tmp_path, monkeypatch):
    undisturbed = search(folder, tmp_path / "undisturbed", path="GGL")
    removed = []

    def remove_folder(self, name):
        removed.append(name)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Folder, "remove_folder", remove_folder)
        with pytest.raises(KeyboardInterrupt):
            search(folder, tmp_path / "o", path="GGL")
    assert removed == ["layers-01"]
    assert {"layers-01", "layers-02"} <= {path.name for path in (tmp_path / "o").iterdir()}
    assert search(folder, tmp_path / "o", path="GGL").structure == undisturbed.structure
    assert differing(tmp_path / "undisturbed", tmp_path / "o") == []
    assert not any(path.name.startswith("layers-") for path in (tmp_path / "o").iterdir())


def test_saved_layers_that_a_finished_search_has_left_go_when_it_is_asked_again(folder, tmp_path):
    first = search(folder, tmp_path / "o", path="G")
    (tmp_path / "o" / "layers-01").mkdir()
    assert search(folder, tmp_path / "o", path="G") == first
    assert not (tmp_path / "o" / "layers-01").exists()
