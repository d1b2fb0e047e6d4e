"""Real sentences on a trained model: what shards find is what lm-eval's own model finds, to the last digit."""

import json

import pytest

from shardprune.evaluation.whole import whole_model
from tests.conftest import SHARED
from tests.evaluation.material import evaluated, requests_of, sharded, write_task

TASKS = ("causative", "npi_present_1", "regular_plural_subject_verb_agreement_1")


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("blimp")
    for name in TASKS:
        data = {"data_files": {"test": str(SHARED / "data" / "blimp" / f"{name}.jsonl")}}
        choices = "{{[sentence_good, sentence_bad]}}"
        write_task(folder, name, dataset_kwargs=data, doc_to_choice=choices)
    return folder


def test_accuracies_are_equal(english_model, tasks):
    asked = {"tasks": ",".join(TASKS), "tasks_dir": str(tasks), "limit": 40}
    whole = evaluated(english_model, **asked, engine="hf", wave=16).evaluation.tasks
    assert evaluated(english_model, **asked, shards=2, replicas=2).evaluation.tasks == whole
    assert evaluated(english_model, **asked, shards=2, weights="streamed").evaluation.tasks == whole
    assert whole["causative"].samples == 40


def test_log_likelihoods_are_equal(english_model):
    lines = (SHARED / "data" / "blimp" / "npi_present_1.jsonl").read_text().splitlines()[:60]
    sentences = [json.loads(line)[key] for line in lines for key in ("sentence_good", "sentence_bad")]
    pairs = [("", " " + sentence) for sentence in sentences]
    pairs += [(sentence[: len(sentence) // 2], sentence[len(sentence) // 2 :]) for sentence in sentences]
    lm, asked = sharded(english_model), requests_of("loglikelihood", pairs)
    found = lm.loglikelihood(asked)
    for one, other in zip(found, whole_model(lm.model).loglikelihood(asked, disable_tqdm=True), strict=True):
        assert one[0] == pytest.approx(other[0], abs=1e-4)
        assert one[1] == other[1]
