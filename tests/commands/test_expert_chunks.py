"""Experts of a layer that are pruned in chunks, one after the other."""

import pytest
import torch

from shardprune.errors import InputError
from shardprune.report.events import read_events
from shardprune.shard.prune_worker import PruneWorker
from shardprune.storage.folder import Folder
from tests.support.architectures import MIXTURES, make_architecture
from tests.support.running import run
from tests.support.tiny import differing, make_model, make_tokens


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    """A folder with a mixture that has shared experts and a layer without any, and its output in one chunk."""
    folder = tmp_path_factory.mktemp("chunks")
    make_architecture(folder / "model", "glm4_moe", {**MIXTURES["glm4_moe"], "n_routed_experts": 6})
    make_tokens(folder / "tokens.npy")
    run(folder, "whole", sparsity=0.5)
    return folder


@pytest.mark.parametrize(
    "fields",
    [{"expert_chunks": 2}, {"expert_chunks": 4, "replicas": 2, "weights": "streamed"}, {"expert_chunks": 100}],
    ids=str,
)
def test_chunks_make_no_difference(mixture, fields):
    out = "-".join(map(str, fields.values()))
    result = run(mixture, out, sparsity=0.5, **fields)
    whole = "whole" if "replicas" not in fields else "replicas"
    if whole == "replicas":
        run(mixture, whole, sparsity=0.5, replicas=2)
    assert differing(mixture / whole, mixture / out) == []
    assert all(facts.achieved == pytest.approx(0.5, abs=0.01) for facts in result.sparsity.projections)


def test_damping_is_measured_chunk_by_chunk(mixture):
    run(mixture, "damped", sparsity=0.5, damping="auto")
    run(mixture, "damped-chunks", sparsity=0.5, damping="auto", expert_chunks=3)
    assert differing(mixture / "damped", mixture / "damped-chunks") == []


@pytest.mark.parametrize("fields", [{"damping": "auto"}, {"refit": True}, {"reconstruct": 2}], ids=str)
def test_the_passes_of_held_out_windows_are_counted(mixture, tmp_path, fields):
    run(mixture, tmp_path / "o", sparsity=0.5, expert_chunks=3, **fields)
    events = [event for event in read_events(Folder(str(tmp_path / "o"), "out")) if event["event"] == "progress"]
    ended = {event["label"]: (event["done"], event["total"]) for event in events}
    assert ended["prune"][0] == ended["prune"][1] > 0


def test_a_run_goes_on_in_other_chunks(mixture, dies_at_layer):
    dies_at_layer(1)
    with pytest.raises(KeyboardInterrupt):
        run(mixture, "cut", sparsity=0.5, expert_chunks=3)
    run(mixture, "cut", sparsity=0.5, expert_chunks=2)
    assert differing(mixture / "whole", mixture / "cut") == []


def test_the_sums_of_one_chunk_are_there_at_a_time(mixture, monkeypatch):
    """Half of the experts, each with two inputs, beside the sums over all tokens; all else with the second half."""
    begun, empty_sums = [], PruneWorker.empty_sums

    def noting(self, index, places):
        assert not self.sums
        found = empty_sums(self, index, places)
        begun.append((index, {int(name.split(".")[2]) for name in found if ".experts." in name}, len(found)))
        return found

    monkeypatch.setattr(PruneWorker, "empty_sums", noting)
    run(mixture, "watched", sparsity=0.5, expert_chunks=2)
    attention, shared, of_all = 2, 2, 1
    assert begun == [
        (0, set(), attention + 2),
        (1, {0, 1, 2}, 6 + of_all),
        (1, {3, 4, 5}, 6 + attention + shared + of_all),
    ]


def test_what_chunks_do_not_go_with_is_refused(mixture, tmp_path):
    with pytest.raises(InputError, match=r"^expert_chunks: 2 does not go with rebuild"):
        run(mixture, "refused", sparsity=0.5, expert_chunks=2, rebuild="barber")
    make_model(tmp_path / "model", dtype=torch.float32)
    make_tokens(tmp_path / "tokens.npy")
    with pytest.raises(InputError, match=r"^expert_chunks: 2 has no effect: the model has no experts"):
        run(tmp_path, "refused", sparsity=0.5, expert_chunks=2)
    assert not (tmp_path / "refused").exists()
