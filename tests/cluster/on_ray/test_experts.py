"""Experts removed by real Ray actors: the same tensors and statistics as in one process, and real kills."""

import pytest

from shardprune import ExpertsRecipe, experts
from shardprune.report.progress import Reporter
from tests.failures.listening import Heard, Moment
from tests.support.architectures import MIXTURES, make_architecture
from tests.support.clusters import kill, processes_of
from tests.support.fp8 import make_fp8
from tests.support.tiny import differing, make_tokens

QUIET = Reporter(quiet=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("experts")
    layers = {"num_hidden_layers": 4, "mlp_only_layers": [1]}
    make_architecture(folder / "model", "qwen3_moe", {**MIXTURES["qwen3_moe"], **layers})
    make_tokens(folder / "tokens.npy")
    return folder


def recipe(folder, out, **fields) -> ExpertsRecipe:
    values = {
        **{"model": str(folder / "model"), "out": str(out), "calibration": str(folder / "tokens.npy"), "keep": 4},
        **{"eval": (str(folder / "tokens.npy"),), "samples": 12, "seqlen": 24, "wave": 2, "threads": 1},
    }
    return ExpertsRecipe.checked({**values, "report": False, **fields})


TRAINED = {"propagate": "pruned", "router_kd": 3, "reconstruct": 3}


@pytest.mark.parametrize(
    ("exchange", "fields"),
    [*(pytest.param("store", fields, marks=pytest.mark.long) for fields in ({}, TRAINED)), ("group", TRAINED)],
)
def test_shards_and_replicas_equal_one_process_with_the_same_layout(ray, folder, exchange, fields, tmp_path):
    layout = {"shards": 2, "replicas": 2, **fields}
    local = experts(recipe(folder, tmp_path / "local", backend="local", **layout), QUIET)
    joined = experts(recipe(folder, tmp_path / "ray", exchange=exchange, **layout), QUIET)
    assert differing(tmp_path / "local", tmp_path / "ray") == []
    assert (joined.experts, joined.perplexity) == (local.experts, local.perplexity)
    assert [layer.layer for layer in local.experts.layers] == [0, 2, 3]
    files = [(tmp_path / name / "experts.json").read_bytes() for name in ("local", "ray")]
    assert files[0] == files[1]


@pytest.mark.long
def test_workers_die_in_the_pass_over_an_fp8_model_and_while_layers_are_written(ray, folder, tmp_path):
    fp8, _ = make_fp8(folder / "model")
    local = experts(recipe(folder, tmp_path / "local", model=fp8, backend="local"), QUIET)
    moments = [
        Moment(step, 0.3, lambda: kill(processes_of("ExpertActor")[-1])) for step in ("observe", "remove experts")
    ]

    def listen(name: str, share: float) -> None:
        for moment in moments:
            moment(name, share)

    result = experts(recipe(folder, tmp_path / "ray", model=fp8, shards=2, weights="streamed"), Heard(listen))
    assert [moment.passed for moment in moments] == [True, True]
    assert result.restarts == 2
    assert differing(tmp_path / "local", tmp_path / "ray") == []
    assert (result.experts, result.perplexity) == (local.experts, local.perplexity)
    assert (tmp_path / "local" / "experts.json").read_bytes() == (tmp_path / "ray" / "experts.json").read_bytes()
