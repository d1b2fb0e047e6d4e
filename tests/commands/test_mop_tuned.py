"""Candidates that are tuned before they are scored: as `recover` tunes them, and thrown away."""

import os

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import pytest

from shardprune import RecoverRecipe, recover
from shardprune.cluster.group import Slots
from shardprune.cluster.local_backend import LocalBackend
from shardprune.cluster.ray_backend import RayBackend
from shardprune.commands.tuned_candidates import CandidateTuning
from shardprune.errors import InputError
from shardprune.recovery.checkpoints import Checkpoints
from shardprune.report.progress import Reporter
from tests.support.running import search_run as search
from tests.support.tiny import differing
from tests.support.tuned import DOCUMENTS, SHARE, make_material, tuned_recipe, tuned_search


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_material(tmp_path_factory.mktemp("tuned"))


@pytest.fixture(scope="module")
def found(folder):
    return tuned_search(folder, "found")


def names(folder):
    return {path.name for path in folder.iterdir()}


def test_scores_are_those_after_the_training_of_recover(folder, found, tmp_path):
    first = found.structure.path[0]
    for letter in "LG":
        search(folder, tmp_path / letter, path=letter)
        values = {
            **{"model": str(tmp_path / letter), "out": str(tmp_path / f"{letter}-tuned"), "report": False},
            **{"data": str(folder / DOCUMENTS), "steps": 3, "length": 12, "batch": 4, "learning_rate": 1e-2, "seed": 5},
            **{"eval": str(folder / "tokens.npy"), "seqlen": 24, "backend": "local", "threads": 1},
        }
        (expected,) = recover(RecoverRecipe.checked(values), Reporter(quiet=True)).perplexity.values()
        assert first.scores[letter] == pytest.approx(expected.after, rel=1e-5)
        assert first.untuned[letter] == pytest.approx(expected.before, rel=1e-5)
        assert abs(first.scores[letter] - first.untuned[letter]) > 1e-3
    plain = search(folder, tmp_path / "plain", remove=SHARE)
    assert first.untuned == pytest.approx(plain.structure.path[0].scores, rel=1e-5)


def test_the_lower_tuned_score_decides_and_untuned_weights_go_on(folder, found, tmp_path):
    path = found.structure.path
    for entry in path:
        if len(entry.scores) == 2:
            assert entry.step.upper() == min(entry.scores, key=entry.scores.get)
        assert entry.scores.keys() == entry.untuned.keys()
    letters = "".join(entry.step.upper() for entry in path)
    given = search(folder, tmp_path / "o", path=letters, remove=SHARE)
    assert [entry.step for entry in given.structure.path] == [entry.step for entry in path]
    assert differing(folder / "found", tmp_path / "o") == []
    assert names(folder / "found") == names(tmp_path / "o")
    assert "tune" in found.seconds


@pytest.mark.long
def test_workers_make_no_difference(folder, found, tmp_path):
    result = tuned_search(folder, tmp_path / "o", shards=2, keep="2")
    assert [entry.step for entry in result.structure.path] == [entry.step for entry in found.structure.path]
    for one, other in zip(result.structure.path, found.structure.path, strict=True):
        assert one.scores == pytest.approx(other.scores, rel=1e-5)
    assert differing(folder / "found", tmp_path / "o") == []


@pytest.mark.parametrize("count", [pytest.param(1, marks=pytest.mark.long), 3])
def test_a_search_that_is_cut_off_while_it_tunes_goes_on(folder, found, count, monkeypatch, tmp_path):
    save, calls = Checkpoints.save, []

    def dying(self, *arguments):
        save(self, *arguments)
        calls.append(arguments)
        if len(calls) == count:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Checkpoints, "save", dying)
        with pytest.raises(KeyboardInterrupt):
            tuned_search(folder, tmp_path / "o")
    assert any(name.startswith("candidate-") for name in names(tmp_path / "o"))
    written = [path.stat().st_mtime_ns for path in (tmp_path / "o").glob("candidate-*-[LG]/*.safetensors")]
    trained = []
    monkeypatch.setattr(Checkpoints, "save", lambda self, *given: trained.append(given) or save(self, *given))
    result = tuned_search(folder, tmp_path / "o")
    assert result.structure == found.structure
    assert differing(folder / "found", tmp_path / "o") == []
    assert names(tmp_path / "o") == names(folder / "found")
    assert written
    candidates = sum(len(entry.scores) for entry in found.structure.path)
    assert len(trained) == candidates - count  # the one whose last step was saved is not trained again


@pytest.mark.parametrize(
    ("cpus", "fields", "fit"),
    [
        (2, {"threads": None}, True),
        (1, {"threads": None}, False),
        (4, {"threads": 2}, True),
        (4, {"threads": 3}, False),
        (4, {"tune_zero": 3}, False),
        (4, {"backend": "local"}, False),
    ],
)
def test_candidates_are_tuned_at_the_same_time_where_each_has_its_share(folder, cpus, fields, fit, tmp_path):
    recipe = tuned_recipe(folder, tmp_path / "o", **{"backend": "ray", **fields})

    class Machine(RayBackend if recipe.backend == "ray" else LocalBackend):
        def slots(self):
            return Slots(cpus, 0, cpus)

    backend = Machine(None, 1.0) if recipe.backend == "ray" else Machine()
    tuning = CandidateTuning(recipe, str(tmp_path / "o"), backend)
    assert tuning._all_fit([str(tmp_path / "o" / "candidate-01-L"), str(tmp_path / "o" / "candidate-01-G")]) is fit


def test_a_share_of_slots_has_room_beside_the_others():
    assert Slots(16, 8, 8).share(2) == Slots(8, 4, 4)
    assert Slots(3, 3, 1).share(2) == Slots(1, 1, 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tune_data": None}, "^tune_data: missing; candidates are tuned on it$"),
        ({"tune_data": "what"}, "^tune_data: 'what' is no known source; use alpaca, "),
        ({"tune_candidates": 0}, "^tune_.*: .* has no effect without tune_candidates$"),
        ({"criterion": "kl"}, "^criterion: 'kl' does not go with tune_candidates; use perplexity$"),
        ({"remove": None, "path": "LG", "scores": False}, "^tune_candidates: has no effect without scores$"),
        ({"tune_data": "gone.jsonl"}, "^tune_data: 'gone.jsonl' does not exist$"),
        ({"tune_length": 100}, "^tune_length: "),
        ({"out": "memory://o"}, "^tune_candidates: trains in 'memory://o'; use a directory that all nodes see$"),
    ],
)
def test_what_cannot_be_tuned_is_refused(folder, change, message, tmp_path):
    out = change.pop("out", tmp_path / "o")
    with pytest.raises(InputError, match=message):
        tuned_search(folder, out, **change)
    assert not (tmp_path / "o").exists()
