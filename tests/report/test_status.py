"""`shardprune status`: where a run stands, told from its events alone."""

import json

import pytest

from shardprune.errors import InputError
from shardprune.report.status import SILENCE_SECONDS, status_of
from tests.support.running import run, search_run


def written(folder, *events):
    """A folder with events, given as (time, event, fields)."""
    folder.mkdir(exist_ok=True)
    lines = [json.dumps({"time": time, "event": event, **fields}) for time, event, fields in events]
    (folder / "events.jsonl").write_text("\n".join(lines) + "\n")
    return str(folder)


RUN = {"command": "prune", "layers": 8}
BEFORE = {"label": "perplexity before", "total": 2}
PRUNE = {"label": "prune", "total": 100}
HALFWAY = (
    (1000, "run", RUN),
    (1000, "attempt", {"finished": []}),
    (1000, "begin", {"phase": "evaluate"}),
    (1000, "progress", {**BEFORE, "done": 0}),
    (1030, "progress", {**BEFORE, "done": 2}),
    (1030, "end", {"phase": "evaluate", "seconds": 30}),
    (1030, "begin", {"phase": "prune"}),
    (1030, "progress", {**PRUNE, "done": 0}),
    (1050, "layer", {**PRUNE, "layer": 0, "detail": "layer 1/8", "done": 25}),
    (1060, "progress", {**PRUNE, "detail": "layer 2/8", "done": 25}),
)


def test_a_running_run_says_when_it_will_end(tmp_path):
    (status,) = status_of(written(tmp_path, *HALFWAY), now=1062)
    assert (status.state, status.phase, status.share, status.finished) == ("running", "prune", 0.25, 1)
    assert status.left == pytest.approx(30 * 75 / 25 + 30)  # the rest at the same pace, and perplexity once more
    assert status.lines(1062)[-1].endswith("in 1:58")


def test_a_silent_run_is_dead_and_says_how_to_go_on(tmp_path):
    (status,) = status_of(written(tmp_path, *HALFWAY), now=1060 + SILENCE_SECONDS + 1)
    assert status.state == "dead"
    assert "the same command goes on" in status.lines(1200)[0]
    assert not any(line.startswith("ends") for line in status.lines(1200))


def test_what_comes_before_the_longest_step_says_nothing_about_the_end(tmp_path):
    (status,) = status_of(written(tmp_path, *HALFWAY[:4], (1010, "progress", {**BEFORE, "done": 1})), now=1011)
    assert (status.share, status.left) == (0.5, None)
    observing = (1005, "progress", {"label": "observe", "total": 4, "done": 0})
    seen = (1010, "progress", {"label": "observe", "total": 4, "done": 3})
    assert status_of(written(tmp_path, HALFWAY[0], observing, seen), now=1011)[0].left is None
    structure = (1001, "begin", {"phase": "structure"})
    assert status_of(written(tmp_path, HALFWAY[0], structure, *HALFWAY[6:]), now=1062)[0].left is None


def test_lines_that_a_failed_write_has_torn_are_passed_over(tmp_path):
    written(tmp_path, *HALFWAY)
    whole = (tmp_path / "events.jsonl").read_text()
    (tmp_path / "events.jsonl").write_text(whole.replace("\n", '\n{"time": 10{"ti\n', 2) + '{"time": 12')
    assert status_of(str(tmp_path), now=1062) == status_of(written(tmp_path, *HALFWAY), now=1062)


def test_attempts_and_losses_are_counted_and_the_last_attempt_counts(tmp_path):
    again = (
        (2000, "run", RUN),
        (2000, "attempt", {"finished": [0, 1, 2]}),  # two of whose events a killed driver took with it
        (2000, "begin", {"phase": "prune"}),
        (2000, "progress", {"label": "prune", "total": 60, "done": 0}),
        (2010, "lost", {"reason": "a worker died"}),
        (2010, "end", {"phase": "prune", "seconds": 10}),
        (2015, "attempt", {"finished": [0, 1, 2, 4]}),  # one of which a lost worker did
        (2020, "begin", {"phase": "prune"}),
        (2020, "progress", {"label": "prune", "total": 50, "done": 0}),
        (2030, "layer", {"label": "prune", "layer": 3, "total": 50, "done": 10}),
    )
    (status,) = status_of(written(tmp_path, *HALFWAY, *again), now=2031)
    assert (status.attempts, status.lost, status.finished) == (2, 1, 5)
    assert status.left == pytest.approx(10 * 40 / 10 + 30)


def test_a_failed_run_names_its_error(tmp_path):
    (status,) = status_of(written(tmp_path, *HALFWAY, (1070, "failed", {"error": "SolverError: layer 3"})), now=5000)
    assert (status.state, status.error) == ("failed", "SolverError: layer 3")
    assert "SolverError: layer 3" in status.lines(5000)[0]


def test_a_search_ends_when_all_is_removed(tmp_path):
    events = (
        (1000, "run", {"command": "mop", "layers": 8}),
        (1000, "begin", {"phase": "search"}),
        (1100, "iteration", {"iteration": 1, "step": "L", "removed": 0.1, "share": 0.25}),
        (1120, "progress", {"label": "iteration 2", "done": 1, "total": 4}),
    )
    (status,) = status_of(written(tmp_path, *events), now=1121)
    assert status.left == pytest.approx(300 - 20)


def test_finished_runs_are_done(folder, tmp_path):
    run(folder, tmp_path / "pruned", sparsity=0.5)
    (status,) = status_of(str(tmp_path / "pruned"))
    assert (status.state, status.command, status.finished, status.layers) == ("done", "prune", 4, 4)
    search_run(folder, tmp_path / "mop", remove=0.4)
    (status,) = status_of(str(tmp_path / "mop"))
    assert (status.state, status.finished) == ("done", None)
    assert [status.folder for status in status_of(str(tmp_path))] == [f"{tmp_path}/pruned"]  # as a pipeline's step


def test_a_composite_counts_the_layers_of_its_second_run(folder, tmp_path):
    run(folder, tmp_path / "o", structured=0.2, sparsity=0.5)
    (status,) = status_of(str(tmp_path / "o"))
    assert (status.state, status.finished) == ("done", 4)


def test_a_folder_without_a_run_is_bad_input(tmp_path):
    with pytest.raises(InputError, match="holds no events of a run"):
        status_of(str(tmp_path))
    written(tmp_path, (1000, "begin", {"phase": "plan"}))
    with pytest.raises(InputError, match="holds no events of a run"):
        status_of(str(tmp_path))
