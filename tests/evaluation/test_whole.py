"""lm-eval's own model, whole in this process."""

import io

import pytest

from shardprune.cluster.local_backend import LocalBackend
from shardprune.evaluation.sharded import ShardedModel
from shardprune.evaluation.whole import whole_model
from shardprune.recipes.evaluate import ShardFields
from shardprune.report.console import PlainConsole
from shardprune.report.progress import Reporter
from tests.evaluation.material import make_readable, requests_of

QUESTIONS = {
    "generation": [("one two", {"until": ["."], "max_gen_toks": 3}), ("three", {"until": ["."], "max_gen_toks": 2})],
    "log-likelihoods": [("one two", " three"), ("one", " two"), ("four", " five six")],
}


@pytest.fixture(scope="module")
def answering(tmp_path_factory):
    """The model, and what is said meanwhile."""
    said = io.StringIO()
    settings = ShardFields.checked({"backend": "local", "threads": 1})
    model = make_readable(tmp_path_factory.mktemp("whole") / "model")
    return whole_model(
        ShardedModel(model, settings, LocalBackend(), Reporter(PlainConsole(file=said, width=200)))
    ), said


@pytest.mark.parametrize("label", QUESTIONS)
def test_progress_counts_requests(answering, label, capsys):
    lm, said = answering
    ask, kind = (lm.generate_until, "generate_until") if label == "generation" else (lm.loglikelihood, "loglikelihood")
    requests = requests_of(kind, QUESTIONS[label])
    assert len(ask(requests, disable_tqdm=True)) == len(requests)
    assert f"{label}  {len(requests)}/{len(requests)}  100%" in said.getvalue()
    assert capsys.readouterr() == ("", "")
