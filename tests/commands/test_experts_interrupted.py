"""Runs that remove experts are cut off anywhere, and go on to the same bits."""

import functools
import json

import pytest

from shardprune.errors import InputError
from shardprune.model.expert_removal import FewerExperts
from shardprune.shard.expert_worker import ExpertWorker
from shardprune.shard.forward_worker import ForwardWorker
from shardprune.storage.folder import Folder
from tests.commands.expert_runs import material, remove
from tests.support.entries import entries
from tests.support.tiny import differing, snapshot

PHASES = {
    "in the pass": (ForwardWorker, "discard", 2),
    "between the layers of a streamed pass": (ForwardWorker, "propagate", 4),
    "when the statistics are collected": (ExpertWorker, "tallies", 1),
    "when the statistics are written": (Folder, "write_text", 0),
    "before the first layer is written": (ExpertWorker, "write", 0),
    "among the layers": (ExpertWorker, "write", 1),
    "when a layer is finished": (ExpertWorker, "finish", 1),
    "in the frame": (Folder, "write", None),
    "behind a cut layer, propagated": (ExpertWorker, "tally", 4),
    "between the statistics and the file of a layer, propagated": (ExpertWorker, "write", 1),
    "in the training of a layer, trained": (ExpertWorker, "cut", 1),
    "when the outputs are collected, merged": (ExpertWorker, "outputs", 1),
    "among the averages of a layer, merged": (FewerExperts, "tensor", 30),
}


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    """A folder with a Qwen3-MoE of six experts in both of its layers."""
    return material(tmp_path_factory.mktemp("mixture"), "qwen3_moe")


@pytest.mark.parametrize(
    "phase",
    entries(
        list(PHASES),
        "in the pass",
        "when the statistics are written",
        "before the first layer is written",
        "when a layer is finished",
        "between the statistics and the file of a layer, propagated",
        "among the averages of a layer, merged",
    ),
)
def test_a_run_that_was_cut_off_goes_on_to_the_same_bits(phase, mixture, tmp_path, monkeypatch):
    owner, name, calls = PHASES[phase]
    changed = {"keep": 4, "eval": (str(mixture / "tokens.npy"),)}
    changed |= {"weights": "streamed"} if "streamed" in phase else {}
    changed |= {"propagate": "pruned"} if "propagated" in phase else {}
    changed |= {"router_kd": 4, "reconstruct": 4} if "trained" in phase else {}
    changed |= {"merge": True} if "merged" in phase else {}
    kind = phase.partition(", ")[2]
    plain = mixture / f"plain {kind}"
    if not plain.exists():
        remove(mixture, plain, **{name: changed[name] for name in changed if name != "weights"})
    original, left = getattr(owner, name), calls

    @functools.wraps(original)
    def failing(self, *args, **keywords):
        nonlocal left
        if calls is None:
            if str(args[0]).startswith("model-00001"):
                raise KeyboardInterrupt
        elif name != "write_text" or args[0] == "experts.json":
            if left == 0:
                raise KeyboardInterrupt
            left -= 1
        return original(self, *args, **keywords)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, failing)
        with pytest.raises(KeyboardInterrupt):
            remove(mixture, tmp_path / "out", **changed)
    assert not (tmp_path / "out" / "result.json").exists()
    finished = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("model-*")}
    observed = (tmp_path / "out" / "experts.json").exists()
    with monkeypatch.context() as patch:
        if observed and "propagated" not in phase:
            patch.setattr(ExpertWorker, "tallies", None)  # no second pass
        result = remove(mixture, tmp_path / "out", **changed)
    assert differing(plain, tmp_path / "out") == []
    assert {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in finished} == finished
    before = json.loads((plain / "result.json").read_text())
    assert result.as_json()["experts"] == before["experts"]
    assert (tmp_path / "out" / "experts.json").read_bytes() == (plain / "experts.json").read_bytes()
    assert not [path for path in (tmp_path / "out").iterdir() if path.name == "run.json"]


def test_a_finished_run_is_not_done_again_and_a_damaged_layer_is(mixture, tmp_path):
    first = remove(mixture, tmp_path / "out", keep=4)
    before = snapshot(tmp_path / "out")
    assert remove(mixture, tmp_path / "out", keep=4, shards=2).experts == first.experts
    assert snapshot(tmp_path / "out") == before
    damaged = tmp_path / "out" / "model-00002-of-00003.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-4])
    remove(mixture, tmp_path / "out", keep=4)
    assert damaged.read_bytes() == before[damaged.name]
    with pytest.raises(InputError, match="^out: .* holds another run"):
        remove(mixture, tmp_path / "out", keep=3)
