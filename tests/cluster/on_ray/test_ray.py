"""Real Ray actors: the same tensors as in one process, and real kills."""

import os
import re
import signal
import threading
import time
import urllib.request

import pytest

from shardprune import MopRecipe, RebuildRecipe, Recipe, mop, prune, rebuild
from shardprune.cluster import ray_backend, ray_exchange
from shardprune.cluster.ray_backend import settled_slots
from shardprune.cluster.ray_exchange import Exchange
from shardprune.errors import InputError, WorkerLost
from shardprune.report.progress import Reporter
from tests.cluster.on_ray.material import bundled, search
from tests.failures.listening import Heard, Moment
from tests.support.clusters import kill, processes_of
from tests.support.entries import entries
from tests.support.tiny import differing, make_model, make_tokens

QUIET = Reporter(quiet=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ray")
    for family in (*FAMILIES, "llama"):
        make_model(folder / family, family)
    make_tokens(folder / "tokens.npy")
    make_tokens(folder / "other.npy", samples=7, seed=1)
    return folder


def recipe(folder, out, model="llama-3.1", **fields) -> Recipe:
    values = {
        "model": str(folder / model),
        "out": str(out),
        "calibration": str(folder / "tokens.npy"),
        "eval": (str(folder / "other.npy"),),
        "sparsity": 0.5,
        "samples": 12,
        "seqlen": 24,
        "wave": 4,
        "threads": 1,
        **fields,
    }
    return Recipe.checked(values)


# The other families differ from these in nothing that a worker's process could change; tests/commands/test_prune.py
# has them all on several shards of one process.
FAMILIES = ("llama-3.1", "gemma2")


@pytest.mark.parametrize("family", [FAMILIES[0], pytest.param(FAMILIES[1], marks=pytest.mark.long)])
def test_a_family_on_two_shards_equals_one_process(ray, folder, family, tmp_path):
    local = prune(recipe(folder, tmp_path / "local", family, backend="local"), QUIET)
    sharded = prune(recipe(folder, tmp_path / "ray", family, shards=2), QUIET)
    assert differing(tmp_path / "local", tmp_path / "ray") == []
    assert sharded.perplexity == local.perplexity
    assert sharded.sparsity == local.sparsity
    assert [worker.layers for worker in sharded.workers] == [(0, 1), (2, 3)]


BARBER = {"outlier_m": 3.0, "rebuild": "barber", "rebuild_threshold": 0.3}
SCENARIOS = {
    "parallel, more segments than shards, streamed": {
        "shards": 2,
        "segments": 4,
        "propagation": "parallel",
        "weights": "streamed",
    },
    "parallel replicas, error curves": {
        "shards": 2,
        "replicas": 2,
        "propagation": "parallel",
        "allocation": "fisher",
    },
    "outliers and masks rebuilt, replicas": {"shards": 2, "replicas": 2, "allocation": "owl", **BARBER},
    "outliers and masks rebuilt, parallel, streamed": {
        "shards": 2,
        "propagation": "parallel",
        "weights": "streamed",
        "allocation": "mosaic",
        "rebuild_granularity": "block",
        **BARBER,
    },
    "dense stream, trained": {"shards": 2, "targets": "stream", "reconstruct": 3},
    "narrower, streamed": {"shards": 2, "weights": "streamed", "structured": 0.3, "sparsity": None},
    "narrower, then sparse, on replicas": {"shards": 2, "replicas": 2, "structured": 0.2, "method": "wanda"},
    "on text of its own": {"shards": 2, "replicas": 2, "calibration": "self", "self_batch": 2, "targets": "own"},
    "replicas of a pattern without a Hessian": {
        "replicas": 3,
        "method": "magnitude",
        "pattern": "2:4",
        "sparsity": None,
        "measure_error": False,
    },
}


@pytest.mark.parametrize(
    "fields",
    entries(
        SCENARIOS,
        "parallel replicas, error curves",
        "narrower, streamed",
        "on text of its own",
        "replicas of a pattern without a Hessian",
        "parallel, more segments than shards, streamed",
        "narrower, then sparse, on replicas",
        "outliers and masks rebuilt, replicas",
        "dense stream, trained",
    ),
)
def test_scenarios_equal_one_process_with_the_same_layout(ray, folder, fields, tmp_path):
    local = prune(recipe(folder, tmp_path / "local", backend="local", **fields), QUIET)
    sharded = prune(recipe(folder, tmp_path / "ray", **fields), QUIET)
    assert differing(tmp_path / "local", tmp_path / "ray") == []
    assert sharded.perplexity == local.perplexity
    assert sharded.sparsity == local.sparsity
    assert len(sharded.workers) == fields.get("shards", 1) * fields.get("replicas", 1)


# The scenarios above go through the object store.
JOINED = {
    "shards and replicas": {"shards": 2, "replicas": 2, "allocation": "owl", **BARBER},
    "error curves, replicas, more than inputs": {"replicas": 4, "samples": 11, "allocation": "fisher"},
    "parallel, streamed": {
        "shards": 2,
        "replicas": 2,
        "segments": 3,
        "propagation": "parallel",
        "weights": "streamed",
        "allocation": "mosaic",
        "outlier_m": 3.0,
    },
    "dense stream, parallel": {
        "shards": 2,
        "replicas": 2,
        "propagation": "parallel",
        "weights": "streamed",
        "targets": "stream",
        "reconstruct": 3,
    },
    "narrower": {"shards": 2, "replicas": 2, "structured": 0.2, "sparsity": None},
    "on text of its own": {"shards": 3, "calibration": "self", "self_batch": 3, "targets": "own"},
}


@pytest.mark.parametrize(
    "fields", entries(JOINED, "shards and replicas", "error curves, replicas, more than inputs", "on text of its own")
)
def test_a_process_group_gives_the_same_bits(ray, folder, fields, tmp_path):
    local = prune(recipe(folder, tmp_path / "local", backend="local", **fields), QUIET)
    joined = prune(recipe(folder, tmp_path / "ray", exchange="group", **fields), QUIET)
    assert differing(tmp_path / "local", tmp_path / "ray") == []
    assert (joined.perplexity, joined.sparsity) == (local.perplexity, local.sparsity)
    assert {worker.exchange for worker in joined.workers} == {"gloo"}
    assert {worker.exchange for worker in local.workers} == {None}
    assert (joined.recipe["exchange"], local.recipe["exchange"]) == ("group", "auto")


def test_workers_that_do_not_reach_one_another(ray, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(ray_exchange, "JOIN_SECONDS", 0.0)
    with pytest.raises(InputError, match="exchange: 'group': the workers do not reach one another at .*; use store"):
        prune(recipe(folder, tmp_path / "o", shards=2, exchange="group"), QUIET)


def test_a_sparse_checkpoint_is_rebuilt_on_shards(ray, folder, tmp_path):
    prune(recipe(folder, tmp_path / "sparse", backend="local"), QUIET)
    fields = recipe(folder, "o").model_dump(include=set(RebuildRecipe.model_fields)) | {
        "sparse": str(tmp_path / "sparse"),
        "rebuild_threshold": 0.3,
    }
    local = rebuild(RebuildRecipe.checked({**fields, "out": str(tmp_path / "local"), "backend": "local"}), QUIET)
    sharded = rebuild(RebuildRecipe.checked({**fields, "out": str(tmp_path / "ray"), "shards": 2}), QUIET)
    assert differing(tmp_path / "local", tmp_path / "ray") == []
    assert (sharded.perplexity, sharded.sparsity) == (local.perplexity, local.sparsity)


SEARCHES = {
    "candidates one behind the other on shards": {"shards": 3, "criterion": "perplexity", "depth_rule": "cosine"},
    "shards and replicas": {"shards": 2, "replicas": 2, "criterion": "cosine", "score": "obs"},
    "every layer tried": {"shards": 2, "criterion": "random", "depth_rule": "perplexity", "correction": False},
    "candidates side by side in a process group": {"shards": 3, "criterion": "kl", "exchange": "group"},
    "replicas in a process group": {"shards": 1, "replicas": 4, "criterion": "cosine", "exchange": "group"},
}


def search_recipe(folder, out, **fields) -> MopRecipe:
    values = recipe(folder, out).model_dump(include=set(MopRecipe.model_fields) - {"score", "correction", "outlier_m"})
    return MopRecipe.checked({**values, "model": str(folder / "llama"), "remove": 0.5, "keep": "1", **fields})


@pytest.mark.parametrize(
    "fields",
    entries(
        SEARCHES,
        "shards and replicas",
        "every layer tried",
        "replicas in a process group",
        "candidates one behind the other on shards",
    ),
)
def test_searches_equal_one_process(ray, folder, fields, tmp_path):
    alone = {**fields, "shards": 1, "backend": "local", "exchange": "auto"}
    local = mop(search_recipe(folder, tmp_path / "local", **alone), QUIET)
    sharded = mop(search_recipe(folder, tmp_path / "ray", **fields), QUIET)
    assert (sharded.structure, sharded.perplexity) == (local.structure, local.perplexity)
    assert differing(tmp_path / "local", tmp_path / "ray") == []
    assert differing(tmp_path / "local" / "iteration-01", tmp_path / "ray" / "iteration-01") == []


METRIC = re.compile(r'^ray_shardprune_(\w+)\{.*WorkerId="(\w+)".*shard="(\d)".*\} (\S+)$', re.MULTILINE)


def scraped(ray) -> list[tuple[str, str, str, float]]:
    """What Prometheus would get of our metrics now: name, process, shard, value."""
    found = []
    for node in ray.nodes():
        with urllib.request.urlopen(f"http://127.0.0.1:{node['MetricsExportPort']}/metrics", timeout=10) as page:
            text = page.read().decode()
        found += [(name, process, shard, float(value)) for name, process, shard, value in METRIC.findall(text)]
    return found


def test_metrics_say_what_workers_do(ray, folder, tmp_path):
    earlier = {process for _, process, _, _ in scraped(ray)}
    found: dict[str, dict[str, float]] = {}

    def scrape() -> None:
        deadline = time.monotonic() + 240
        while time.monotonic() < deadline and found.get("layers_done_total") != {"0": 2, "1": 2}:
            time.sleep(0.3)
            for name, process, shard, value in scraped(ray):
                if process not in earlier:
                    found.setdefault(name, {})[shard] = value

    # While the workers wait for the driver, all layers done and one wave of the evaluation under way.
    prune(recipe(folder, tmp_path / "o", shards=2), Heard(Moment("perplexity after", 0.3, scrape)))
    assert found["layers_done_total"] == {"0": 2, "1": 2}
    assert found["solver_seconds_count"] == {"0": 8, "1": 8}  # four inputs of every layer
    assert found["waves_total"]["0"] >= 3  # of one verb; three waves
    assert found["bytes_moved_total"]["1"] >= 3 * 4 * 24 * 32 * 4  # which all came to the second shard


def test_more_workers_than_the_cluster_has(ray, folder, tmp_path):
    with pytest.raises(InputError, match="shards: 6 workers need as many CPUs; the cluster has 4"):
        prune(recipe(folder, tmp_path / "o", shards=2, replicas=3), QUIET)
    assert not (tmp_path / "o").exists()


# -- kills ----------------------------------------------------------------------------------------------------


@pytest.mark.long
def test_a_killed_worker_costs_a_search_one_iteration(ray, tmp_path):
    undisturbed = mop(search(tmp_path / "local", backend="local"), QUIET)
    moment = Moment("iteration 3", 0.5, lambda: kill(processes_of("MopActor")[-1]))
    result = mop(search(tmp_path / "o", shards=2), Heard(moment))
    assert moment.passed
    assert result.restarts == 1
    assert result.structure == undisturbed.structure
    assert differing(tmp_path / "local", tmp_path / "o") == []


@pytest.mark.long
def test_a_worker_dies_while_the_model_writes_its_text(ray, folder, tmp_path):
    fields = {"calibration": "self", "self_batch": 3, "shards": 2, "targets": "own"}
    prune(recipe(folder, tmp_path / "local", backend="local", **fields), QUIET)
    moment = Moment("generate", 0.7, lambda: kill(processes_of("GenerationActor")[0]))  # of two rounds of two waves
    result = prune(recipe(folder, tmp_path / "o", **fields), Heard(moment))
    assert moment.passed
    assert result.restarts == 1
    assert (tmp_path / "o" / "self.npy").read_bytes() == (tmp_path / "local" / "self.npy").read_bytes()
    assert differing(tmp_path / "local", tmp_path / "o") == []


def test_workers_die_in_the_middle_of_exchanges(ray, tmp_path, monkeypatch):
    """In a chain that has begun, and in the next attempt while a wave goes from shard to shard: others wait for
    the worker that is killed."""
    submit, moments = Exchange.submit, ["sum_up", "put"]
    processes = {}  # of the second replicas of both shards, by their group

    def submitted(self, place, verb, *args):
        if self not in processes:
            asked = [self._actors[rank].__ray_call__.remote(lambda worker: os.getpid()) for rank in (1, 3)]
            processes[self] = ray.get(asked)
        ref = submit(self, place, verb, *args)
        chain = verb.__name__ == "sum_up" and args[0] == 2 and place == (0, 0)
        wave = verb.__name__ == "put" and args[0] == "segment from layer 0" and place == (1, 1)
        if (chain or wave) and moments[:1] == [verb.__name__]:
            moments.pop(0)
            os.kill(processes[self][1 if wave else 0], signal.SIGKILL)
        return ref

    monkeypatch.setattr(Exchange, "submit", submitted)
    fields = {"shards": 2, "replicas": 2, "samples": 8, "seqlen": 64}
    result = prune(bundled(tmp_path / "o", exchange="group", **fields), QUIET)
    prune(bundled(tmp_path / "local", backend="local", **fields), QUIET)
    assert moments == []
    assert result.restarts == 2
    assert differing(tmp_path / "local", tmp_path / "o") == []


@pytest.mark.long
def test_workers_that_keep_dying_end_the_run(ray, tmp_path):
    stop = threading.Event()

    def kill_all() -> None:
        while not stop.wait(0.2):
            for process in processes_of("PruneActor"):
                kill(process)

    killer = threading.Thread(target=kill_all)
    killer.start()
    try:
        with pytest.raises(WorkerLost):
            prune(bundled(tmp_path / "o", shards=2, max_restarts=1), QUIET)
    finally:
        stop.set()
        killer.join()
    assert prune(bundled(tmp_path / "o", shards=2), QUIET).restarts == 2
    prune(bundled(tmp_path / "local", shards=2, backend="local"), QUIET)
    assert differing(tmp_path / "local", tmp_path / "o") == []


def test_a_node_that_is_slow_to_answer_is_asked_once(ray, monkeypatch):
    asked, looked, nodes = [], [], ray.nodes
    place = ray_backend.NodeAffinitySchedulingStrategy
    monkeypatch.setattr(
        ray_backend, "NodeAffinitySchedulingStrategy", lambda node, soft: asked.append(node) or place(node, soft=soft)
    )
    monkeypatch.setattr(ray_backend, "PROBE_SECONDS", 0.0)  # no answer comes in time
    monkeypatch.setattr(ray, "nodes", lambda: looked.append(1) or nodes())
    assert settled_slots().cpus == 4
    assert len(looked) > 2  # and one look to count the slots
    assert len(asked) == 1
