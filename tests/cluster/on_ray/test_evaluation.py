"""Evaluation on real Ray actors: the same numbers as in one process, whatever happens to a worker."""

import re
import signal
import socket

import psutil
import pytest

from shardprune import EvaluateRecipe, evaluate
from shardprune.errors import InputError, WorkerLost
from shardprune.recipes.demo import bundled_model
from shardprune.report.progress import Reporter, Step
from tests.evaluation.material import QUIET, write_task
from tests.support.clusters import PATIENCE, processes_of


class Sending(Reporter):
    """Sends a signal to a worker as soon as the first wave of log-likelihoods is through, and keeps what is said."""

    def __init__(self, number: signal.Signals) -> None:
        super().__init__(quiet=True)
        self.number, self.said = number, []
        self.victim: psutil.Process | None = None

    def show(self, step: Step) -> None:
        if step.label == "log-likelihoods" and step.done == 1 and not self.victim:
            self.victim = processes_of("ForwardActor")[-1]
            self.victim.send_signal(self.number)

    def say(self, text: str) -> None:
        self.said.append(text)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    write_task(folder, "words", documents=40)

    def make(**fields) -> EvaluateRecipe:
        values = {
            "model": bundled_model(),
            "perplexity": "stdlib",
            "seqlen": 128,
            "windows": 24,
            "wave": 4,
            "tasks": "words",
            "tasks_dir": str(folder),
            "threads": 1,
            **fields,
        }
        return EvaluateRecipe.checked(values)

    return make


@pytest.fixture(scope="module")
def local(recipe):
    return evaluate(recipe(backend="local"), QUIET)


def test_shards_and_replicas_measure_what_one_process_does(ray, recipe, local):
    result = evaluate(recipe(shards=2, replicas=2), QUIET)
    assert result.evaluation == local.evaluation
    assert [(worker.shard, worker.replica, worker.layers) for worker in result.workers] == [
        (0, 0, (0, 3)),
        (0, 1, (0, 3)),
        (1, 0, (4, 7)),
        (1, 1, (4, 7)),
    ]


@pytest.mark.parametrize("number", [signal.SIGKILL, pytest.param(signal.SIGSTOP, marks=pytest.mark.long)])
def test_a_lost_worker_is_replaced(ray, recipe, local, number):
    reporter = Sending(number)
    result = evaluate(recipe(shards=2, patience=PATIENCE), reporter)
    assert result.restarts == 1
    assert result.evaluation == local.evaluation
    reporter.victim.wait(60)
    (said,) = [text for text in reporter.said if text.startswith("a worker was lost (")]
    if number == signal.SIGSTOP:
        # The last process of both is not always that of the last worker.
        named = rf"worker [01]\.0 \(process {reporter.victim.pid} on {re.escape(socket.gethostname())}\)"
        assert re.search(rf"{named} has given no sign of life", said)


@pytest.mark.long
def test_a_stopped_worker_ends_an_evaluation_that_may_not_restart(ray, recipe):
    reporter = Sending(signal.SIGSTOP)
    with pytest.raises(WorkerLost, match=r"worker 0.0 \(process \d+ on .*\) has given no sign of life for"):
        evaluate(recipe(patience=PATIENCE, max_restarts=0), reporter)
    reporter.victim.wait(60)


def test_more_workers_than_the_cluster_has(ray, recipe):
    with pytest.raises(InputError, match="shards: 8 workers need as many CPUs; the cluster has 4"):
        evaluate(recipe(shards=4, replicas=2), QUIET)
