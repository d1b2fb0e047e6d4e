"""Layouts that a run chooses for the machine."""

import pytest
import torch
from transformers import AutoConfig

from shardprune import Recipe
from shardprune.cluster.group import Slots
from shardprune.cluster.placement import place_run
from shardprune.model.skeleton import Skeleton
from shardprune.storage.folder import output_folder
from shardprune.storage.output_names import STATE
from shardprune.storage.relative_paths import relative_paths
from tests.support.tiny import make_model


@pytest.mark.parametrize(
    ("fields", "replicas"),
    [
        ({"samples": 64}, 8),
        ({"samples": 6}, 6),
        ({"samples": 9, "reconstruct": 1}, 5),
        ({"samples": 9, "refit": True}, 5),
        ({"samples": 12, "quality": "best"}, 8),
    ],
)
def test_every_replica_has_a_window_that_is_not_held_out(fields, replicas, tmp_path):
    make_model(tmp_path / "model", "llama-3.1")
    skeleton = Skeleton(AutoConfig.from_pretrained(tmp_path / "model"), "cpu", torch.float32)
    asked = {"sparsity": 0.5, "seqlen": 8, "calibration": "stdlib", "model": str(tmp_path / "model")}
    recipe = Recipe.checked({**asked, **fields, "out": str(tmp_path / "o")})
    placement = place_run(recipe, Slots(cpus=16, gpus=8, cpus_of_a_node=16), "cuda", skeleton)
    assert placement.layout.replicas == replicas


@pytest.mark.parametrize("out", ["o", "memory://placement"])
@pytest.mark.parametrize("calibration", [["./t.txt"], ["./t.txt", "stdlib"], ["{}/t.txt:2", "stdlib:1"]])
def test_a_run_keeps_the_threads_of_its_start_however_its_texts_are_spelled(out, calibration, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_model(tmp_path / "model", "llama-3.1")
    skeleton = Skeleton(AutoConfig.from_pretrained(tmp_path / "model"), "cpu", torch.float32)
    texts = [text.format(tmp_path) for text in calibration]
    asked = {"sparsity": 0.5, "targets": "own", "seqlen": 8, "calibration": texts}
    recipe = Recipe.checked({**asked, "model": "./model", "out": out})
    slots, folder = Slots(cpus=16, gpus=0, cpus_of_a_node=16), output_folder(out)
    chosen = place_run(recipe, slots, "cpu", skeleton).choices()
    record = recipe.model_copy(update={**chosen, "threads": 7}).record()
    folder.write_json(STATE, relative_paths({"recipe": record}, folder.url))
    assert place_run(recipe, slots, "cpu", skeleton).workers.threads == 7
    folder.remove(STATE)
