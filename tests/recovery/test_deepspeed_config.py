"""DeepSpeed's configuration, and what a user may add to it."""

import json

import pytest

from shardprune.errors import InputError
from shardprune.recovery.deepspeed_config import OURS, deepspeed_config, read_overrides


def built(overrides=None, **fields):
    values = {
        "zero": 2,
        "offload": False,
        "bf16": False,
        "batch": 16,
        "micro": 2,
        "processes": 4,
        "clip": 0.5,
        "learning_rate": 1e-3,
        "weight_decay": 0.1,
        **fields,
    }
    return deepspeed_config(**values, overrides=overrides or {})


def test_the_recipe_becomes_deepspeeds_words():
    config = built()
    assert (config["train_batch_size"], config["train_micro_batch_size_per_gpu"]) == (16, 2)
    assert config["gradient_accumulation_steps"] == 2
    assert config["gradient_clipping"] == 0.5
    assert config["zero_optimization"]["stage"] == 2
    assert config["bf16"] == {"enabled": False}
    assert config["optimizer"]["type"] == "AdamW"
    given = {"lr": 1e-3, "weight_decay": 0.1, "torch_adam": True, "fused": True}
    assert config["optimizer"]["params"].items() >= given.items()
    assert config["data_types"] == {"grad_accum_dtype": "fp32"}


def test_deepspeeds_own_optimizer_for_cpus_takes_no_settings_of_torchs():
    assert not {"torch_adam", "fused"} & built(offload=True)["optimizer"]["params"].keys()


def test_reductions_overlap_the_backward_pass_under_stage_2():
    assert [built(zero=zero)["zero_optimization"].get("overlap_comm") for zero in range(4)] == [None, None, True, None]


@pytest.mark.parametrize(
    ("zero", "offloaded"),
    [(1, {"offload_optimizer"}), (2, {"offload_optimizer"}), (3, {"offload_optimizer", "offload_param"})],
)
def test_what_is_offloaded(zero, offloaded):
    zero_optimization = built(zero=zero, offload=True)["zero_optimization"]
    assert {name for name in zero_optimization if name.startswith("offload")} == offloaded
    assert all(zero_optimization[name]["device"] == "cpu" for name in offloaded)
    assert not any(name.startswith("offload") for name in built(zero=zero)["zero_optimization"])


def test_overrides_reach_into_objects():
    overrides = {
        "optimizer": {"params": {"betas": [0.5, 0.6], "weight_decay": 0.3}},
        "zero_optimization": {"overlap_comm": False},
        "wall_clock_breakdown": True,
    }
    config, plain = built(overrides), built()
    assert config["optimizer"]["params"] == plain["optimizer"]["params"] | {"betas": [0.5, 0.6], "weight_decay": 0.3}
    assert config["zero_optimization"] == plain["zero_optimization"] | {"overlap_comm": False}
    assert config["wall_clock_breakdown"] is True
    assert config["optimizer"]["type"] == "AdamW"


@pytest.mark.parametrize("path", OURS, ids=".".join)
def test_what_the_recipe_says_is_refused(tmp_path, path):
    values: object = 1
    for key in reversed(path):
        values = {key: values}
    file = tmp_path / "ds.json"
    file.write_text(json.dumps(values))
    with pytest.raises(InputError, match=rf"^deepspeed: '.*ds.json' sets {'.'.join(path)}, .* use {OURS[path]}$"):
        read_overrides(str(file))


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("{", "is not JSON"),
        ("[" * 5000, "is not JSON: recursion limit"),
        ('{"a": NaN}', "is not JSON"),
        ('{"a": 1, "a": 2}', "has the name 'a' twice"),
        ("[1]", "must hold an object"),
        ("\xff", "is not UTF-8 text"),
        (None, ""),
    ],
)
def test_a_file_that_is_none(tmp_path, content, problem):
    file = tmp_path / "ds.json"
    if content is not None:
        file.write_bytes(content.encode("latin-1"))
    with pytest.raises(InputError, match=f"^deepspeed: .*{problem}"):
        read_overrides(str(file))


def test_other_settings_of_an_object_of_ours_are_taken(tmp_path):
    file = tmp_path / "ds.json"
    file.write_text('{"zero_optimization": {"overlap_comm": false}}')
    assert read_overrides(str(file)) == {"zero_optimization": {"overlap_comm": False}}
