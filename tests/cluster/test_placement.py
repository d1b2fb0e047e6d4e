"""Layouts that a run chooses for the machine."""

import pytest
import torch
from transformers import AutoConfig

from shardprune import Recipe
from shardprune.cluster.group import Slots
from shardprune.cluster.placement import place_run
from shardprune.model.skeleton import Skeleton
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
