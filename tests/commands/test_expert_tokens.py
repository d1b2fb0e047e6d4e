"""Experts that are pruned by the sums over all tokens, through the command."""

import pytest

from shardprune.errors import InputError
from tests.support.architectures import MIXTURES, make_architecture
from tests.support.running import run
from tests.support.tiny import differing, make_model, make_tokens

ALL = {"sparsity": 0.5, "expert_tokens": "all"}


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokens")
    make_architecture(folder / "model", "qwen3_moe", MIXTURES["qwen3_moe"])
    make_tokens(folder / "tokens.npy")
    run(folder, "routed", sparsity=0.5)
    run(folder, "all", **ALL)
    return folder


def test_all_tokens_make_other_masks_of_experts_on_any_workers(mixture):
    others = differing(mixture / "routed", mixture / "all")
    assert any(".experts." in name for name in others)
    run(mixture, "apart", **ALL, shards=2, weights="streamed", expert_chunks=2)
    assert differing(mixture / "all", mixture / "apart") == []


def test_it_is_part_of_what_a_run_is(mixture):
    with pytest.raises(InputError, match="holds another run"):
        run(mixture, "all", sparsity=0.5)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"targets": "stream"}, "expert_tokens: 'all' does not go with targets stream"),
        ({"method": "magnitude"}, "expert_tokens: 'all' has no effect without a method or an allocation that looks"),
    ],
    ids=["stream", "magnitude"],
)
def test_what_it_does_not_go_with_is_refused(mixture, fields, message):
    with pytest.raises(InputError, match=f"^{message}"):
        run(mixture, "refused", **ALL, **fields)
    assert not (mixture / "refused").exists()


def test_a_class_whose_code_takes_no_token_with_one_expert(tmp_path):
    make_architecture(tmp_path / "model", "longcat_flash", MIXTURES["longcat_flash"])
    make_tokens(tmp_path / "tokens.npy")
    reason = "transformers' code of longcat_flash sends no token to one expert alone; use routed"
    with pytest.raises(InputError, match=f"^expert_tokens: 'all' is not possible: {reason}$"):
        run(tmp_path, "refused", **ALL)
    assert not (tmp_path / "refused").exists()


def test_a_model_without_experts(tmp_path):
    make_model(tmp_path / "model", "llama-3.1")
    make_tokens(tmp_path / "tokens.npy")
    with pytest.raises(InputError, match="^expert_tokens: 'all' has no effect: the model has no experts"):
        run(tmp_path, "refused", **ALL)
