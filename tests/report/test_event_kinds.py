"""Events of any shape, as a torn disk or somebody else's output may hold them."""

import json
import random
from contextlib import suppress

import pytest

from shardprune.errors import InputError
from shardprune.report.events import Events, read_events
from shardprune.report.page.history import History
from shardprune.report.page.timeline import timeline
from shardprune.report.status import status_of
from shardprune.storage.folder import Folder

STEP = {"label": "prune", "total": 100}
SPAN = ["solve", 0, 1040.0, 1050.0, 9.0, 4, 0, "solve"]
EVENTS = [
    {"time": 1000, "event": "run", "command": "prune", "fingerprint": "a", "layers": 8},
    {"time": 1000, "event": "attempt", "finished": [0, 1], "shards": 1, "replicas": 1},
    {"time": 1030.5, "event": "begin", "phase": "prune"},
    {"time": 1030.5, "event": "progress", **STEP, "detail": "", "done": 0},
    {"time": 1045, "event": "progress"},
    {"time": 1050, "event": "work", "shard": 0, "replica": 0, "spans": [SPAN, SPAN[:7], SPAN[:5]]},
    {"time": 1050, "event": "layer", "layer": 2, "shard": 0, "error": 0.1, **STEP, "detail": "layer 3/8", "done": 25},
    {"time": 1060, "event": "iteration", "iteration": 1, "step": "L", "removed": 0.1, "share": 0.25},
    {"time": 1070, "event": "lost", "reason": "a node died"},
    {"time": 1080, "event": "end", "phase": "prune", "seconds": 50},
    {"time": 1090, "event": "failed", "error": "SolverError: layer 3"},
]
JUNK = (
    None,
    True,
    -1,
    10**30,
    1e308,
    float("nan"),
    "",
    "x" * 9,
    "\x1b[31m\u202e",
    [],
    [[]],
    {},
    {"time": 1},
    [None],
    0,
)


def lines(folder, rows):
    (folder / "events.jsonl").write_bytes(b"\n".join(rows) + b"\n")
    return str(folder)


def plain(events):
    return [json.dumps(event).encode() for event in events]


def test_all_events_of_a_run_have_their_shape(tmp_path):
    assert read_events(Folder(lines(tmp_path, plain(EVENTS)), "out")) == EVENTS


WRONG = {
    "no object": b"[]",
    "no JSON": b"{",
    "no text": b'{"time": 1040, "event": "begin", "phase": "\xff\xfe"}'[:-3] + b"\xff",
    "deep": b'{"time": 1040, "event": ' + b"[" * 5000,
    "no time": b'{"event": "begin", "phase": "x"}',
    "a time before all": b'{"time": -1, "event": "begin", "phase": "x"}',
    "a time after all": b'{"time": 1e300, "event": "begin", "phase": "x"}',
    "no number": b'{"time": NaN, "event": "begin", "phase": "x"}',
    "a name twice": b'{"time": 1040, "event": "done", "event": "begin", "phase": "x"}',
    "no event of this version": b'{"time": 1040, "event": "magic", "total": {}}',
    "no phase": b'{"time": 1040, "event": "begin"}',
    "half a position": b'{"time": 1040, "event": "progress", "total": 5}',
    "a label alone": b'{"time": 1040, "event": "layer", "layer": 1, "label": "perplexity before"}',
    "layers that are none": b'{"time": 1040, "event": "attempt", "finished": [[1]]}',
    "spans that are none": b'{"time": 1040, "event": "work", "shard": 0, "replica": 0, "spans": [[1, 2]]}',
    "a share that is none": b'{"time": 1040, "event": "iteration", "iteration": 1, "step": "L", "share": "1"}',
}


@pytest.mark.parametrize("line", WRONG.values(), ids=WRONG)
def test_what_is_no_event_is_passed_over(tmp_path, line):
    (expected,) = status_of(lines(tmp_path, plain(EVENTS)), now=1100)
    rows = plain(EVENTS)
    assert status_of(lines(tmp_path, [*rows[:5], line, *rows[5:]]), now=1100) == [expected]
    assert (expected.state, expected.finished, expected.lost) == ("failed", 3, 1)


def test_a_run_goes_on_after_a_log_that_is_no_text(tmp_path):
    (tmp_path / "events.jsonl").write_bytes(b'{"time": 1, "event": "run", "command": "p\xff"}\n\xff\xfe')
    events = Events()
    with events.recorded(Folder(str(tmp_path), "out"), command="prune"):
        pass
    assert [event["event"] for event in read_events(Folder(str(tmp_path), "out"))] == ["run", "run", "done"]


def test_no_event_of_another_shape_ends_a_status_or_a_timeline(tmp_path):
    source = random.Random(0)
    for _ in range(150):
        events = json.loads(json.dumps(EVENTS))
        for _ in range(source.randint(1, 4)):
            event = source.choice(events)
            event[source.choice([*event, "total", "share", "phase", "label", "done"])] = source.choice(JUNK)
        source.shuffle(events)
        rows = [json.dumps(event).encode() for event in events]
        out = lines(tmp_path, rows)
        with suppress(InputError):  # where no event `run` is left
            for status in status_of(out, now=source.choice((0, 1095, 4e9))):
                assert all(line.isprintable() for line in status.lines(1100))
        if found := read_events(Folder(out, "out")):
            timeline(History(found)).as_json()
