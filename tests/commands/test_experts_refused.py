"""Recipes, models and statistics that are refused before any experts go."""

import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from shardprune import ExpertsRecipe, experts
from shardprune.cli import main
from shardprune.errors import InputError
from shardprune.report.progress import Reporter
from tests.commands.expert_runs import fields, material, remove
from tests.support.tiny import make_model

REFUSED = {
    "remove: missing; give the share of experts to remove, or the number to keep": {},
    "remove: 1.5 is not allowed; use a number above 0 and below 1": {"remove": 1.5},
    "keep: 4 does not go with remove 0.5; give one of them": {"remove": 0.5, "keep": 4},
    "multiple: 2 has no effect without remove": {"keep": 4, "multiple": 2},
    "remove: 0.25 (a multiple of 8) keeps 8 of 6 experts, so that nothing would go; give a smaller --multiple": {
        "remove": 0.25
    },
    "keep: 6 keeps 6 of 6 experts, so that nothing would go": {"keep": 6},
    "keep: 1 keeps 1 of 6 experts; at least 2 must stay, because a token gets 2": {"keep": 1},
    "has no effect without a pass: aimer looks at the weights alone": {"keep": 4, "score": "aimer"},
    "merge: does not go with score aimer, which looks at no tokens; use another one": {
        "keep": 4,
        "score": "aimer",
        "merge": True,
        "calibration": ("c4",),
    },
    "samples: 4 is too few for router_kd, which holds out some; use at least 8": {
        "keep": 4,
        "samples": 4,
        "router_kd": 2,
    },
    "score: 'best' is not allowed; use one of reap, frequency": {"keep": 4, "score": "best"},
}


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    """A folder with a Qwen3-MoE of six experts in both of its layers."""
    return material(tmp_path_factory.mktemp("mixture"), "qwen3_moe")


@pytest.mark.parametrize("problem", REFUSED)
def test_bad_input_is_refused_before_any_work(problem, mixture):
    with pytest.raises(InputError) as found:
        remove(mixture, "refused", **REFUSED[problem])
    assert problem in str(found.value)
    assert not (mixture / "refused").exists()


def test_models_and_statistics_that_do_not_fit_are_refused(mixture, tmp_path):
    make_model(tmp_path / "dense")
    given = fields(mixture, tmp_path / "out", keep=2, model=str(tmp_path / "dense"))
    with pytest.raises(InputError, match="^model: model_type 'llama' has no experts in its layers"):
        experts(ExpertsRecipe.checked(given), Reporter(quiet=True))
    other = material(tmp_path / "other", "olmoe")
    remove(other, "out", keep=2)
    text = {"calibration": ("c4",)}
    for folder, problem in (
        (other / "out", "^statistics: .*experts.json is of another model"),
        (other / "model", "^statistics: .* holds no experts.json; give the output of `shardprune experts`"),
    ):
        with pytest.raises(InputError, match=problem):
            remove(mixture, tmp_path / "out", keep=4, statistics=str(folder), **text)
    assert not (tmp_path / "out").exists()


def test_further_layers_with_other_experts_are_refused(mixture, tmp_path):
    for name, shape in (
        ("model.layers.2.mlp.experts.6.up_proj.weight", (16, 32)),  # the layers have six
        ("model.layers.2.mlp.gate.weight", (8, 32)),
        ("model.layers.2.moe.experts.0.w1.weight", (16, 32)),
    ):
        shutil.copytree(mixture / "model", tmp_path / "model", dirs_exist_ok=True)
        tensors = load_file(mixture / "model" / "model.safetensors")
        save_file({**tensors, name: torch.zeros(shape)}, tmp_path / "model" / "model.safetensors", {"format": "pt"})
        with pytest.raises(InputError, match=f"^model: .* holds {re.escape(name)}, of a layer that transformers does"):
            remove(mixture, tmp_path / "out", model=str(tmp_path / "model"), keep=4)
    assert not (tmp_path / "out").exists()


def test_the_command_says_what_is_wrong_in_one_line_with_exit_code_2(mixture, capsys):
    text = ("--calibration", str(mixture / "tokens.npy"), "--samples", "12", "--seqlen", "24", "--backend", "local")
    with pytest.raises(SystemExit) as end:
        main(["experts", str(mixture / "model"), "--out", str(mixture / "refused"), "--keep", "1", *text])
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("keep: 1 keeps 1 of 6 experts; at least 2 must stay, because a token gets 2")
