"""Layers that a model does not run for text, as those of Llama 3.2 Vision that attend to images, stay as they are."""

import numpy as np
import pytest
import torch
from transformers import AutoConfig

from shardprune.commands.check import check
from shardprune.errors import InputError
from shardprune.model.skeleton import Skeleton
from shardprune.model.verification import check_class, check_class_writes, difference_layer_by_layer, small_config
from shardprune.planning.plan import plan
from shardprune.planning.recipe import PlanRecipe
from shardprune.report.progress import Reporter
from tests.commands.test_towers import perplexity
from tests.support.running import run, search_run
from tests.support.tiny import differing, load_tensors
from tests.support.towers import TOWERS, make_tower

TEXT = TOWERS["mllama"]["text_config"]
NOT_RUN = tuple(f"language_model.model.layers.{index}." for index in (1, 3))
PROJECTIONS = 2 * 7


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mllama")
    make_tower(folder / "model", "mllama")
    words = np.random.default_rng(0).integers(0, 60, (12, 24))
    np.save(folder / "tokens.npy", words)
    return folder


def text_config(**fields):
    return AutoConfig.for_model(**{**TEXT, **fields})


@pytest.mark.parametrize(
    "fields",
    [
        {"pattern": "2:4"},
        {"sparsity": 0.6, "method": "wanda", "allocation": "owl", "shards": 3, "weights": "streamed"},
        {"sparsity": 0.6, "method": "wanda", "allocation": "mosaic", "shards": 2, "propagation": "parallel"},
        {"sparsity": 0.6, "method": "wanda", "allocation": "fisher", "shards": 2},
        {"sparsity": 0.5, "rebuild": "barber", "rebuild_threshold": 0.5},
        {"sparsity": 0.5, "reconstruct": 2, "replicas": 2},
    ],
    ids=lambda fields: "-".join(map(str, fields.values())),
)
def test_they_stay_and_the_target_is_the_others(folder, tmp_path, fields):
    result = run(folder, tmp_path / "out", eval=(str(folder / "tokens.npy"),), **fields)
    before, after = load_tensors(folder / "model"), load_tensors(tmp_path / "out")
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert len(changed) == len(result.sparsity.projections) == PROJECTIONS
    assert any(name.startswith(NOT_RUN) for name in before)
    assert not any(name.startswith(NOT_RUN) for name in changed)
    assert [layer.layer for layer in result.sparsity.layers] == [0, 2]
    zeros, weights = (sum(int(count(after[name])) for name in changed) for count in (zeros_of, torch.numel))
    assert zeros / weights == pytest.approx(result.sparsity.achieved, abs=1e-9)
    assert result.sparsity.achieved == pytest.approx(fields.get("sparsity", 0.5), abs=2e-3)
    (measured,) = result.perplexity.values()
    tokens = torch.from_numpy(np.load(folder / "tokens.npy"))
    assert measured.before == pytest.approx(perplexity(folder / "model", tokens), rel=1e-4)
    assert measured.after == pytest.approx(perplexity(tmp_path / "out", tokens), rel=1e-4)
    assert [verdict.faults for verdict in check(str(tmp_path / "out"))] == [[]]


def zeros_of(tensor):
    return (tensor == 0).sum()


def test_the_run_and_the_plan_say_how_many_there_are(folder, tmp_path, capsys):
    run(folder, tmp_path / "out", reporter=Reporter(), sparsity=0.5, method="magnitude")
    assert "left dense: 2 of 4 layers (not run for text)" in " ".join(capsys.readouterr().err.split())


def test_a_plan_does_not_pay_for_their_products(folder):
    values = {"model": str(folder / "model"), "hardware": "cpu", "samples": 12, "seqlen": 24, "sparsity": 0.5}
    task = plan(PlanRecipe.checked(values)).plans[0].candidate.task
    assert task.model.shape is task.model.shapes[0]  # not the largest, which is one of those that do not run
    assert max(shape.elements for shape in task.model.shapes) == task.model.shapes[1].elements
    forward = [task.model.at(index).forward_operations(24, 24) for index in range(4)]
    assert forward[0] == forward[2] > 0
    assert forward[1] == forward[3] == 0
    assert [task.model.at(index).forward_bytes(1, 24, 4) > 0 for index in range(4)] == [True, False, True, False]


@pytest.mark.parametrize("layers", [[1, 3], [0, 2], [0, 1], [2, 3], []], ids=str)
def test_layer_by_layer_equals_the_whole_model_wherever_they_are(layers):
    config = text_config(cross_attention_layers=layers)
    assert difference_layer_by_layer(config) == 0.0
    kinds = Skeleton(config, "cpu").family.kinds
    assert [index for index, kind in enumerate(kinds) if not kind.runs] == layers
    assert [index for index, kind in enumerate(kinds) if not kind.projections] == layers


def test_a_model_that_runs_none_is_refused():
    with pytest.raises(InputError, match="^model: .*the model calls none of its layers"):
        Skeleton(text_config(cross_attention_layers=[0, 1, 2, 3]), "cpu")


def test_a_small_model_of_the_class_has_one_of_them():
    config = text_config(num_hidden_layers=10, cross_attention_layers=[3, 8], bos_token_id=128000)
    small = small_config(config)
    assert (small.num_hidden_layers, small.cross_attention_layers) == (3, [1])
    check_class(config)
    check_class_writes(config)


def test_patterns_of_ignored_projections_name_none_of_theirs(folder, tmp_path):
    with pytest.raises(InputError, match=r"^ignore: 'model.layers.1.\*' matches no projection; their names are such"):
        run(folder, tmp_path / "out", sparsity=0.5, ignore=("model.layers.1.*",))


def test_the_model_writes_its_text_without_them(folder, tmp_path):
    for name, fields in (("single", {}), ("sharded", {"shards": 2, "weights": "streamed"})):
        run(folder, tmp_path / name, sparsity=0.5, calibration="self", **fields)
    assert differing(tmp_path / "single", tmp_path / "sharded") == []
    assert (tmp_path / "single" / "self.npy").read_bytes() == (tmp_path / "sharded" / "self.npy").read_bytes()


@pytest.mark.parametrize(("start", "fields"), [(run, {"structured": 0.3}), (search_run, {"remove": 0.2})])
def test_what_needs_structures_is_refused_in_one_line(folder, tmp_path, start, fields):
    with pytest.raises(InputError, match="the heads, neurons and outputs of model_type 'mllama_text_model' are not"):
        start(folder, tmp_path / "out", **fields)
    assert not (tmp_path / "out").exists()
