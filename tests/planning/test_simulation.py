"""The simulated run against closed forms, and against the formulae of `seconds`."""

from dataclasses import dataclass
from typing import get_args

import pytest

from shardprune.cluster.layout import plan_layout
from shardprune.planning.chart import IDLE, LINES, MARKS, WIDTH, idle_share, rows_of, timeline
from shardprune.planning.costs import Costs, Places
from shardprune.planning.moments import Setup
from shardprune.planning.recipe import PlanRecipe
from shardprune.planning.seconds import Expected
from shardprune.planning.simulated_verbs import NOT_SIMULATED, ROWS
from shardprune.planning.simulation import simulate
from shardprune.planning.traffic import traffic_of
from shardprune.planning.workload import planned_task, read_model
from shardprune.shard.expert_worker import ExpertWorker
from shardprune.shard.ledger import Kind
from shardprune.shard.narrowed_layers import NarrowedLayers
from shardprune.shard.prune_worker import PruneWorker
from shardprune.shard.verbs import kind_of, verbs_of
from shardprune.solvers.triangles import lower_entries
from tests.planning.material import CONFIGS

SLACK = 0.02  # what calls and their sending take, of steps of ten seconds
WAVE = 10.0


def costs_of(
    shards=1,
    replicas=1,
    propagation="exact",
    streamed=False,
    gpus=8,
    model="8b",
    kind=Costs,
    on_host=False,
    joined=False,
    **fields,
):
    values = {"samples": 16, "wave": 1, **fields}
    recipe = PlanRecipe.checked({"model": str(CONFIGS / f"llama-3.1-{model}"), **values})
    shapes = read_model(recipe.model)
    layout = plan_layout(shapes.layers, recipe.samples, propagation, shards, replicas, None)
    setup = Setup(layout, streamed, on_host, gpu=True, joined=joined)
    return kind(planned_task(recipe, shapes), setup, recipe.row, Places(replicas, gpus))


@dataclass(frozen=True)
class Even(Costs):
    """Every shard takes as long with a wave as any other, every pass over a layer takes as long, and nothing else
    takes any time."""

    def embed(self, sequences):
        return 0.0

    def forward(self, sequences, layers):
        return WAVE

    def accumulate(self, sequences, places):
        return WAVE

    def propagate(self, sequences):
        return WAVE

    def _nothing(self, *_):
        return 0.0

    put = take = losses = statistics = merge = solve = solved = install = write = read = fork = _nothing


@pytest.mark.parametrize("shards", [1, 4, 8])
def test_a_pipeline_of_equal_shards_takes_its_waves_and_the_shards_before_the_last(shards):
    group = simulate(costs_of(shards, kind=Even, eval="wikitext2", eval_windows=12))
    assert group.phases["evaluate"] == pytest.approx(2 * (12 + shards - 1) * WAVE, rel=SLACK)


def test_replicas_take_the_waves_side_by_side():
    one = simulate(costs_of(4, 1, kind=Even, eval="wikitext2", eval_windows=12))
    three = simulate(costs_of(4, 3, kind=Even, eval="wikitext2", eval_windows=12))
    assert three.phases["evaluate"] == pytest.approx(2 * (4 + 4 - 1) * WAVE, rel=SLACK)
    assert three.phases["evaluate"] < one.phases["evaluate"]


@pytest.mark.parametrize(("shards", "replicas"), [(1, 1), (4, 1), (1, 4), (4, 4)])
def test_exact_propagation_prunes_layer_after_layer_and_splits_the_waves_alone(shards, replicas):
    group = simulate(costs_of(shards, replicas, gpus=16, kind=Even, network="1000000GB/s"))
    passes = 2 * 32 - 1  # the image of the last layer is not needed
    assert group.phases["prune"] == pytest.approx(passes * 16 / replicas * WAVE, rel=SLACK)
    assert idle_share(group) == pytest.approx(1 - 1 / shards, abs=SLACK)


def test_parallel_propagation_prunes_all_segments_at_once():
    group = simulate(costs_of(4, 1, "parallel", kind=Even))
    assert group.phases["prune"] == pytest.approx((2 * 8 - 1) * 16 * WAVE, rel=SLACK)
    # The waves end where the last segment begins: at the last shard, which passes nothing on.
    assert group.phases["observe"] == pytest.approx((16 + 4 - 1) * WAVE, rel=SLACK)


def test_one_worker_waits_for_nobody():
    group = simulate(costs_of(streamed=True, samples=64))
    worker = group.workers[0, 0]
    assert worker.busy + worker.reading == pytest.approx(group.seconds, rel=SLACK)


def test_streamed_layers_are_read_while_the_one_before_is_in_work():
    group = simulate(costs_of(streamed=True, storage="100GB/s"))
    slow = simulate(costs_of(streamed=True, storage="10MB/s"))
    read = slow.costs.read(slow.task.model.layer)
    assert group.workers[0, 0].reading < 0.01 * group.seconds
    assert slow.phases["prune"] == pytest.approx(32 * read + slow.costs.read(slow.task.model.embedding), rel=0.1)


def test_what_goes_from_node_to_node_takes_its_bytes_over_the_bandwidth():
    fast = simulate(costs_of(2, gpus=1, kind=Even, network="1000000GB/s"))
    slow = simulate(costs_of(2, gpus=1, kind=Even, network="1MB/s"))
    handed_on = 16 * 2048 * 4096 * 2  # once, at the only boundary
    assert traffic_of(slow).between_nodes == handed_on
    assert slow.seconds - fast.seconds == pytest.approx(handed_on / 1e6, rel=SLACK)


def test_the_bytes_of_replicas_are_their_sums_and_solved_projections():
    replicas, nodes = 4, 2
    group = simulate(costs_of(1, replicas, gpus=2))
    model = group.task.model
    # Of the lower triangle, four panels of 1024 columns, and seven of 2048.
    sums = sum(4 * one.cols**2 * (4 if one.cols == 14336 else 4.375) // 7 for one in model.inputs)
    layer = (replicas - 1) * (sums + 2 * model.projections)
    assert traffic_of(group).between_workers == 32 * layer
    # Two of the three replicas that send their sums are on the other node; it fetches solved projections once.
    across = 2 * sums + (nodes - 1) * 2 * model.projections
    assert traffic_of(group).between_nodes == 32 * across


def test_in_a_process_group_sums_and_projections_go_from_rank_to_rank():
    group = simulate(costs_of(1, 4, gpus=2, joined=True))
    model = group.task.model
    sums, solved = sum(4 * lower_entries(one.cols) for one in model.inputs), 2 * model.projections
    # Three hops each; every layer's sums go on from the last replica to those that solve the other three inputs.
    moved = traffic_of(group).between_workers - 32 * 3 * (sums + solved)
    assert 0 < moved < 32 * sums
    # Of the three hops of a chain one is between the nodes; broadcasts may come round to a second.
    across = traffic_of(group).between_nodes
    assert 32 * (sums + solved) <= across <= 2 * 32 * (sums + solved)


def test_what_comes_before_a_chain_is_waited_for_by_all_its_workers():
    apart, joined = (simulate(costs_of(1, 4, joined=joined, streamed=True)) for joined in (False, True))
    assert joined.seconds < apart.seconds
    # Where one worker goes from chain to chain, another waits in between; all end their last one together.
    ends = [max(span.end for span in worker.spans if span.verb == "sum_up") for worker in joined.workers.values()]
    assert ends == pytest.approx([ends[0]] * 4, abs=1e-2)


def test_every_worker_reads_its_layers_once_or_once_per_pass():
    fields = {"eval": "wikitext2", "eval_windows": 4}
    resident, streamed = simulate(costs_of(2, **fields)), simulate(costs_of(2, streamed=True, **fields))
    model = resident.task.model
    frame = 2 * model.embedding
    assert traffic_of(resident).read == 2 * (32 * model.layer + frame)
    assert traffic_of(streamed).read == 2 * (3 * 32 * model.layer + 2 * model.head + 3 * model.embedding)


LAYOUTS = [
    {"replicas": 8, "streamed": True, "joined": True, "samples": 128, "model": "70b", "wave": 2},
    {"shards": 4, "joined": True},
    {},
    {"streamed": True},
    {"streamed": True, "on_host": True},
    {"model": "70b", "streamed": True, "samples": 128, "wave": 2},
    {"shards": 4},
    {"shards": 4, "propagation": "parallel"},
    {"shards": 8, "propagation": "parallel", "gpus": 4},
    {"shards": 4, "streamed": True, "propagation": "parallel", "allocation": "owl"},
    {"replicas": 4, "streamed": True},
    {"shards": 2, "replicas": 4, "allocation": "owl"},
    {"shards": 4, "eval": "wikitext2", "eval_windows": 32},
    {"streamed": True, "eval": "wikitext2", "eval_windows": 32},
    {"method": "wanda", "measure_error": False},
    {"targets": "stream"},
    {"targets": "stream", "streamed": True, "on_host": True, "replicas": 2, "samples": 32},
    {"targets": "stream", "replicas": 4, "joined": True, "samples": 64},
    {"reconstruct": 50},
    {"reconstruct": 50, "replicas": 4, "samples": 64},
    {"reconstruct": 20, "targets": "stream", "replicas": 4, "joined": True, "samples": 64},
    {"targets": "stream", "shards": 4, "propagation": "parallel", "allocation": "owl"},
    {"damping": "auto", "replicas": 4, "joined": True, "samples": 64},
    {"damping": "auto", "replicas": 2, "samples": 32},
    {"method": "alps", "replicas": 2, "samples": 32},
    {"method": "wanda", "refit": True, "measure_error": False},
    {"allocation": "fisher", "shards": 4},
    {"allocation": "fisher", "streamed": True, "eval": "wikitext2", "eval_windows": 32},
    {"allocation": "fisher", "shards": 4, "streamed": True, "samples": 64},
    {"allocation": "fisher", "shards": 2, "replicas": 4, "samples": 64},
    {"allocation": "fisher", "replicas": 4, "joined": True, "streamed": True, "samples": 64},
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_the_formulae_say_what_the_driver_does(layout):
    costs = costs_of(**layout)
    assert Expected(costs).phases().total == pytest.approx(simulate(costs).seconds, rel=0.1)


def test_a_thousand_workers_are_simulated():
    group = simulate(costs_of(126, 8, "parallel", model="405b", samples=256, wave=2))
    assert len(group.workers) == 1008
    lines = timeline(group)
    assert len(lines) == LINES
    assert all(len(chart) == WIDTH for _, chart, _ in lines)
    assert len(rows_of(group)) == 1008


def test_every_verb_of_a_planned_worker_is_simulated_or_left_out_on_purpose():
    known = [*ROWS, *NOT_SIMULATED]
    workers = PruneWorker, ExpertWorker
    assert {verb.__name__ for verb in known if kind_of(verb)} == {name for one in workers for name in verbs_of(one)}
    submitted = {getattr(owner, verb.__name__, None) for owner in (*workers, NarrowedLayers) for verb in ROWS}
    assert ROWS.keys() <= submitted, "what the driver submits is looked up"


def test_every_kind_of_work_has_its_mark():
    assert set(get_args(Kind)) == MARKS.keys()
    assert len({*MARKS.values(), IDLE}) == len(MARKS) + 1


def test_a_timeline_shows_who_works_when():
    (first, *_), (second, *_) = (line[1:] for line in timeline(simulate(costs_of(2, kind=Even))))
    half = WIDTH // 2
    assert set(first[: half - 1]) <= {"a", "p"}
    assert set(first[half + 1 :]) == {"."}
    assert set(second[: half - 1]) == {"."}
    assert set(second[half + 1 :]) <= {"a", "p"}
