"""Plans of FP8 checkpoints: bytes of the files, memory of the products."""

import json
from pathlib import Path

import pytest

from shardprune.planning.plan import plan
from shardprune.planning.recipe import PlanRecipe
from shardprune.planning.workload import read_model
from tests.support.fp8 import make_fp8
from tests.support.tiny import load_tensors, make_model


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fp8") / "model"
    make_model(folder)
    return make_fp8(folder, block=(16, 16))


def test_bytes_are_those_of_the_files_and_memory_that_of_the_products(models):
    fp8, plain = (read_model(model) for model in models)
    stored = sum(tensor.nbytes for tensor in load_tensors(models[0]).values())
    assert fp8.stored == plain.stored
    assert fp8.in_files < 1.5
    assert fp8.in_files * fp8.parameters == stored
    assert plain.in_files == 2
    planned = [
        plan(PlanRecipe.checked({"model": model, "gpus": 1, "hardware": "h100", "samples": 8, "seqlen": 24}))
        for model in models
    ]
    one, other = (result.plans[0] for result in planned)
    assert one.traffic.read < 0.75 * other.traffic.read
    assert one.traffic.written == other.traffic.written


def test_a_config_alone_says_that_its_weights_will_be_fp8(models, tmp_path):
    config = tmp_path / "config.json"
    config.write_text(Path(models[0], "config.json").read_text())
    expected, found = read_model(str(config)), read_model(models[0])
    assert expected.in_files == pytest.approx(found.in_files, rel=0.05)
    other = json.loads(config.read_text())
    del other["quantization_config"]
    config.write_text(json.dumps(other))
    assert read_model(str(config)).in_files == 2
