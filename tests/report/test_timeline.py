"""A timeline against made-up events whose answer is plain, and against those of real runs."""

from typing import get_args

import pytest

from shardprune.report.events import read_events
from shardprune.report.page.history import TRAINING, History, Work
from shardprune.report.page.timeline import COLUMNS, IDLE, STYLES, _rows, timeline
from shardprune.report.page.workers import LINES
from shardprune.shard.ledger import Kind
from shardprune.storage.folder import Folder


def event(time, name, **fields):
    return {"time": time, "event": name, **fields}


def work(time, shard, *spans):
    rows = [["verb", None, start, end, busy, 1, 0, kind] for kind, start, end, busy in spans]
    return event(time, "work", shard=shard, replica=0, spans=rows)


def attempt(start, *events, end):
    """One driver: it plans for ten seconds, then prunes."""
    return [
        event(start, "begin", phase="plan"),
        event(start + 10, "end", phase="plan"),
        event(start + 10, "run"),
        event(start + 10, "begin", phase="prune"),
        *events,
        *([event(end, "end", phase="prune"), event(end, "done")] if end else []),
    ]


# Shard 0 solves from 20 to 60 and writes until 70, shard 1 propagates from 60 to 100, half busy until 80.
PLAIN = attempt(
    0.0,
    work(70.0, 0, ("solve", 20.0, 60.0, 40.0), ("write", 60.0, 70.0, 10.0)),
    work(100.0, 1, ("propagate", 60.0, 80.0, 8.0), ("propagate", 80.0, 100.0, 20.0)),
    end=120.0,
)


def at(row, share):
    return row.kinds[int(share * COLUMNS)]


def test_columns_show_what_took_most_of_their_time():
    history = History(PLAIN)
    first, second = _rows(history, 120.0 / COLUMNS)
    assert [at(first, seconds / 120) for seconds in (10, 30, 59, 65, 80)] == [None, "solve", "solve", "write", IDLE]
    assert [at(second, seconds / 120) for seconds in (30, 70, 90, 110)] == [None, IDLE, "propagate", None]
    assert first.idle == pytest.approx(1 - 50 / 80)  # there from 20 to 100, when the last worker was done
    assert second.idle == pytest.approx(1 - 28 / 40)


def test_spans_of_an_older_version_which_say_no_kind_are_shown_too():
    spans = event(70.0, "work", shard=0, replica=0, spans=[["solve", 0, 20.0, 60.0, 40.0, 4, 0]])
    (row,) = _rows(History(attempt(0.0, spans, end=120.0)), 120.0 / COLUMNS)
    assert at(row, 30 / 120) == "exchange"


def test_every_kind_of_work_has_its_style():
    assert set(get_args(Kind)) | {TRAINING, IDLE} == STYLES.keys()


def test_phases_are_the_innermost():
    events = [
        event(0.0, "begin", phase="structure"),
        event(2.0, "begin", phase="load"),
        event(5.0, "end", phase="load"),
        event(6.0, "end", phase="structure"),
    ]
    assert History(events).phases == [("structure", 0.0, 2.0), ("load", 2.0, 5.0), ("structure", 5.0, 6.0)]


@pytest.mark.parametrize("silent", [1.0, 960.0])
def test_the_time_between_two_drivers_is_left_out(silent):
    killed, later = attempt(0.0, work(40.0, 0, ("solve", 20.0, 40.0, 20.0)), end=None), 40.0 + silent
    again = attempt(later, work(later + 30, 0, ("solve", later + 20, later + 30, 10.0)), end=later + 40)
    history = History([*killed, *again])
    (cut,) = history.interruptions
    assert (cut.time, cut.silent) == (40.0, silent)
    assert [history.at(time) for time in (0, 40, 40 + silent / 2, later, later + 40)] == [0, 40, 40, 40, 80]
    phases = [("plan", 0, 10), ("prune", 10, 40), ("plan", later, later + 10), ("prune", later + 10, later + 40)]
    assert history.phases == phases
    (row,) = _rows(history, 80.0 / COLUMNS)
    assert [at(row, seconds / 80) for seconds in (10, 30, 50, 65)] == [None, "solve", None, "solve"]
    assert row.idle == 0
    plot = timeline(history)
    assert f"↻1: the command started again after {silent:.0f} s, which are left out." in plot.text
    assert [shape.x0 for shape in plot.figure.layout.shapes] == [40.0]


@pytest.mark.parametrize("events", [[event(5.0, "run")], attempt(0.0, end=20.0), [event(1.0, "lost", reason="all")]])
def test_there_may_be_no_worker_to_show(events):
    """As where a driver was killed between the last layer and the index, and was started again."""
    plot = timeline(History(events))
    assert list(plot.figure.layout.yaxis.categoryarray) == ["phases"]
    assert len(plot.figure.data) == 1


def test_lost_workers_are_marked():
    lost = event(50.0, "lost", reason="node2 is gone")
    events = attempt(0.0, work(40.0, 0, ("solve", 20.0, 40.0, 20.0)), lost, end=None)
    events += [work(90.0, 0, ("solve", 70.0, 90.0, 20.0)), event(100.0, "done")]
    history = History(events)
    assert len(history.stints) == 2
    (row,) = _rows(history, 1.0)
    assert row.idle == 0, "between the loss and the new workers there were none"
    assert "↻1: workers lost: node2 is gone." in timeline(history).text


def test_processes_of_a_training_work_throughout_its_phase():
    events = [event(0.0, "begin", phase="recover"), event(30.0, "end", phase="recover")]
    stints = History(events, [(0, 0), (1, 0)]).stints
    assert [(stint.key, stint.work) for stint in stints] == [
        (key, (Work("train", 0.0, 30.0, 30.0),)) for key in ((0, 0), (1, 0))
    ]


def test_many_workers_share_lines():
    spans = [work(20.0, shard, ("solve", 10.0, 20.0, 10.0 if shard % 2 else 0.0)) for shard in range(3 * LINES)]
    rows = _rows(History(attempt(0.0, *spans, end=20.0)), 20.0 / COLUMNS)
    assert len(rows) == LINES
    assert rows[0].label == "0.0 to 2.0"
    assert rows[0].idle == pytest.approx(2 / 3)
    assert rows[1].idle == pytest.approx(1 / 3)


@pytest.mark.parametrize("name", ["owl", "mop", "composite", "interrupted"])
def test_real_runs_fill_their_time(runs, name):
    history = History(read_events(Folder(str(runs.folder / name), "out")))
    result = runs.results[name]
    seconds = sum(entry.busy for stint in history.stints for entry in stint.work)
    if name in ("owl", "mop"):  # the others had several groups of workers, of which the result has the last
        assert seconds == pytest.approx(sum(worker.busy_seconds for worker in result.workers), rel=0.1, abs=0.02)
    (row,) = _rows(history, (history.at(history.end) or 1.0) / COLUMNS)
    assert {"solve", "write"} & set(row.kinds)
    assert len(history.interruptions) == (name == "interrupted")
