"""The progress of pruning: what counts as how much, and what is said while a layer is solved."""

import pytest

from shardprune.cluster.pending_work import PendingWork
from shardprune.cluster.solution_parts import narrowing_parts
from shardprune.model.families import FAMILIES, Family, LayerKind
from shardprune.report.events import read_events
from shardprune.report.progress import Reporter, Step
from shardprune.solvers.methods import Effort
from shardprune.storage.folder import Folder
from tests.support.running import run, search_run

SHAPES = {
    "self_attn.q_proj": (8192, 8192),
    "self_attn.k_proj": (1024, 8192),
    "self_attn.v_proj": (1024, 8192),
    "self_attn.o_proj": (8192, 8192),
    "mlp.gate_proj": (28672, 8192),
    "mlp.up_proj": (28672, 8192),
    "mlp.down_proj": (8192, 28672),
}
INPUTS = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)
ATTENTION = frozenset(name for name in SHAPES if name.startswith("self_attn."))
KIND = LayerKind(INPUTS, INPUTS, ATTENTION, structures=FAMILIES["llama"])
FAMILY = Family("model.layers", (KIND, KIND))


def pending(factorises):
    return PendingWork({}, frozenset(), FAMILY, [SHAPES] * 2, [], None, False, effort=Effort(sweeps=factorises))


def test_solutions_count_as_the_waves_that_would_take_as_many_operations():
    work, down = pending(True), ("mlp.down_proj",)
    operations = 28672**3 + 8192 * 28672**2
    wave = 4096 * (sum(rows * cols for rows, cols in SHAPES.values()) + 3 * 8192**2 + 28672**2)
    assert work.solve_parts(0, down, 4096) == round(operations / wave) > 3
    assert work.solve_parts(0, ("self_attn.o_proj",), 10**9) == 1
    assert pending(False).solve_parts(0, down, 4096) == 1
    solutions = sum(work.solve_parts(0, names, 4096) for names in INPUTS)
    # Two layers, five waves: two passes over each but the last one's second; its solutions and its file.
    assert work.parts((range(2),), 5, 4096) == 5 * 3 + 2 * (solutions + 1)


def test_a_layer_that_is_solved_says_how_many_projections_are(folder, tmp_path, monkeypatch):
    seen = []
    show = Reporter.show

    def noting(self, step: Step) -> None:
        seen.append((step.detail, step.done))
        show(self, step)

    monkeypatch.setattr(Reporter, "show", noting)
    run(folder, tmp_path / "o", sparsity=0.5, samples=8)
    solved = [detail for detail, _ in seen if detail.startswith("layer 2/4, ")]
    assert list(dict.fromkeys(solved)) == [f"layer 2/4, {count} of 7 projections solved" for count in (0, 3, 4, 6)]
    done = {detail: done for detail, done in seen if detail.startswith("layer 2/4")}  # the last of each
    assert done["layer 2/4, 0 of 7 projections solved"] < done["layer 2/4, 6 of 7 projections solved"]


def test_of_a_narrower_layer_the_solutions_of_the_output_projections_count():
    tokens = 4096
    solved = [pending(True).solve_parts(0, (name,), tokens) for name in ("self_attn.o_proj", "mlp.down_proj")]
    assert narrowing_parts(Effort(sweeps=True), KIND, SHAPES, tokens) == sum(solved) > 4
    assert narrowing_parts(Effort(), KIND, SHAPES, tokens) == 1


COUNTED = {
    "zeros": (run, {"sparsity": 0.5}),
    "narrower": (run, {"structured": 0.3, "score": "obs"}),
    "narrower, by the image under the layer as it was": (run, {"structured": 0.3, "score": "obs", "correction": False}),
    "search by activity": (search_run, {"remove": 0.4, "score": "amp", "correction": False}),
    "search by error": (search_run, {"remove": 0.4, "score": "obs", "correction": False}),
    "corrected search": (search_run, {"remove": 0.4, "depth_rule": "perplexity"}),
    "corrected search over replicas": (search_run, {"remove": 0.4, "shards": 2, "replicas": 2}),
}


@pytest.mark.parametrize("name", COUNTED)
def test_every_part_of_a_step_is_counted_once(folder, tmp_path, name):
    start, fields = COUNTED[name]
    start(folder, tmp_path / "o", **fields)
    events = [event for event in read_events(Folder(str(tmp_path / "o"), "out")) if event["event"] == "progress"]
    ended = {event["label"]: (event["done"], event["total"]) for event in events}  # the last of each
    assert any(label in ended for label in ("prune", "iteration 2"))
    assert all(done == total > 0 for done, total in ended.values()), ended


def test_the_solutions_of_a_search_count(folder, tmp_path):
    search_run(folder, tmp_path / "o", path="GL", scores=True, score="amp", correction=False, depth_rule="third-last")
    events = read_events(Folder(str(tmp_path / "o"), "out"))
    totals = {event["label"]: event["total"] for event in events if event["event"] == "progress"}
    # Three waves through each candidate for its score, and once more for the activity; four layers are cut.
    assert totals["iteration 1"] == 3 + 3 * 2 + 4
