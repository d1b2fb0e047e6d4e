"""Evaluation on real Ray actors: the same numbers as in one process, whatever happens to a worker."""

import signal

import pytest

from shardprune import EvaluateRecipe, evaluate
from shardprune.errors import InputError
from shardprune.recipes.demo import bundled_model
from shardprune.report.progress import Reporter, Step
from tests.evaluation.material import QUIET, write_task
from tests.support.clusters import processes_of


class Killing(Reporter):
    """Kills a worker as soon as the first wave of a step is through."""

    def __init__(self, label: str) -> None:
        super().__init__(quiet=True)
        self.label, self.killed = label, 0

    def show(self, step: Step) -> None:
        if step.label == self.label and step.done == 1 and not self.killed:
            victim = processes_of("ForwardActor")[-1]
            victim.send_signal(signal.SIGKILL)
            self.killed = victim.pid


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


def test_a_killed_worker_is_replaced(ray, recipe, local):
    reporter = Killing("log-likelihoods")
    result = evaluate(recipe(shards=2), reporter)
    assert reporter.killed
    assert result.restarts == 1
    assert result.evaluation == local.evaluation


def test_more_workers_than_the_cluster_has(ray, recipe):
    with pytest.raises(InputError, match="shards: 8 workers need as many CPUs; the cluster has 4"):
        evaluate(recipe(shards=4, replicas=2), QUIET)
