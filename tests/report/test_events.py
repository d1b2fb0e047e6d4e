"""Events: what a run writes about itself, line by line."""

import json
import time
from contextlib import nullcontext
from itertools import pairwise

import pytest

from shardprune.errors import InputError, Stopped, StorageError
from shardprune.report import events as module
from shardprune.report.events import Events, read_events
from shardprune.report.progress import Reporter
from shardprune.storage.folder import Folder
from shardprune.storage.output_names import EVENTS as FILE
from tests.support.running import run, search_run
from tests.support.tiny import load_tensors


def happened(folder) -> list[str]:
    return [event["event"] for event in read_events(Folder(str(folder), "out"))]


def test_a_run_tells_its_phases_layers_and_what_its_workers_did(folder, tmp_path):
    result = run(folder, tmp_path / "o", sparsity=0.5, shards=2, allocation="owl", eval=str(folder / "other.npy"))
    events = read_events(Folder(str(tmp_path / "o"), "out"))
    assert [event["time"] for event in events] == sorted(event["time"] for event in events)

    (first,) = [event for event in events if event["event"] == "run"]
    assert (first["command"], first["fingerprint"], first["layers"]) == ("prune", result.fingerprint, 4)
    ends = [event["phase"] for event in events if event["event"] == "end"]
    assert ends == ["plan", "load", "evaluate", "observe", "prune", "evaluate", "write"]
    for phase in ends:
        seconds = sum(event["seconds"] for event in events if event["event"] == "end" and event["phase"] == phase)
        assert seconds <= result.seconds[phase] + 0.01

    layers = {event["layer"]: event for event in events if event["event"] == "layer"}
    assert list(layers) == [0, 1, 2, 3]
    assert [layers[index]["shard"] for index in layers] == [0, 0, 1, 1]
    tensors = load_tensors(tmp_path / "o")
    assert result.sparsity is not None
    for index, layer in layers.items():
        own = [record for record in result.sparsity.projections if record.layer == index]
        assert layer["error"] == pytest.approx(sum(record.error for record in own) / len(own), abs=1e-8)
        weights = [tensor for name, tensor in tensors.items() if f"layers.{index}." in name]
        assert layer["bytes"] == sum(tensor.nbytes for tensor in weights)
        wide = [tensor for tensor in weights if tensor.ndim == 2]
        zeros = sum(int((tensor == 0).sum()) for tensor in wide)
        assert layer["sparsity"] == pytest.approx(zeros / sum(tensor.numel() for tensor in wide), abs=1e-6)

    spans = [(event["shard"], *span) for event in events if event["event"] == "work" for span in event["spans"]]
    solved = [(shard, layer, calls) for shard, verb, layer, _, _, _, calls, *_ in spans if verb == "solve"]
    assert solved == [(0, 0, 4), (0, 1, 4), (1, 2, 4), (1, 3, 4)]  # one call for each distinct input
    wave_bytes = 4 * 24 * 32 * 4
    moved = [moved for shard, verb, *_, moved, _ in spans if (shard, verb) == (1, "put")]
    assert sum(moved) == 3 * wave_bytes  # three waves of four sequences arrived at the second shard
    busy = sum(span[5] for span in spans if span[0] == 0)
    assert busy == pytest.approx(result.workers[0].busy_seconds, abs=0.01)
    # Times of day are read apart from the clock of calls, and a busy machine may halt the process in between.
    assert all(start <= end and busy <= end - start + 1.0 for _, _, _, start, end, busy, *_ in spans)


def test_a_resumed_run_adds_to_the_events_and_redoes_no_layer(folder, tmp_path, dies_at_layer):
    dies_at_layer(2)
    with pytest.raises(KeyboardInterrupt):
        run(folder, tmp_path / "o", sparsity=0.5)
    assert happened(tmp_path / "o")[-1] == "stopped"
    with (tmp_path / "o" / FILE).open("a") as file:
        file.write('{"time": 1, "event": "pro')  # what a killed driver may leave
    run(folder, tmp_path / "o", sparsity=0.5)
    events = read_events(Folder(str(tmp_path / "o"), "out"))
    assert [event["finished"] for event in events if event["event"] == "attempt"] == [[], [0, 1]]
    assert [event["layer"] for event in events if event["event"] == "layer"] == [0, 1, 2, 3]
    assert events[-1]["event"] == "done"


def test_a_search_tells_its_iterations(folder, tmp_path):
    result = search_run(folder, tmp_path / "o", remove=0.4)
    events = [event for event in read_events(Folder(str(tmp_path / "o"), "out")) if event["event"] == "iteration"]
    assert result.structure is not None
    assert [event["step"] for event in events] == [entry.step for entry in result.structure.path or ()]
    assert events[-1]["share"] == pytest.approx(1, abs=0.02)


def test_a_composite_has_the_events_of_both_runs(folder, tmp_path):
    run(folder, tmp_path / "o", structured=0.2, sparsity=0.5)
    assert happened(tmp_path / "o").count("layer") == 8
    assert happened(tmp_path / "o").count("run") == 1
    assert not (tmp_path / "o" / "structured").exists()


def test_bad_input_and_a_finished_run_write_no_events(folder, tmp_path):
    with pytest.raises(InputError):
        run(folder, tmp_path / "o", sparsity=0.5, seqlen=65)
    assert not (tmp_path / "o").exists()
    run(folder, tmp_path / "o", sparsity=0.5)
    before = (tmp_path / "o" / FILE).read_bytes()
    run(folder, tmp_path / "o", sparsity=0.5)
    assert (tmp_path / "o" / FILE).read_bytes() == before


ENDS = {"done": None, "stopped": Stopped(), "failed": ValueError("no room at s3://me:secret@bucket/x?token=secret")}


@pytest.mark.parametrize(("end", "error"), ENDS.items(), ids=ENDS)
def test_the_last_event_says_how_an_attempt_ended(tmp_path, end, error):
    folder = Folder(str(tmp_path), "out")
    expected = pytest.raises(type(error)) if error else nullcontext()
    with expected, Events().recorded(folder, command="prune"):
        if error:
            raise error
    assert read_events(folder)[-1]["event"] == end
    assert "secret" not in (tmp_path / FILE).read_text()


def test_a_run_at_work_shows_that_it_is_alive(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "HEARTBEAT_SECONDS", 0.01)
    reporter, folder = Reporter(quiet=True), Folder(str(tmp_path), "out")
    with reporter.events.recorded(folder, command="prune"), reporter.step("prune", 4) as step:
        step.advance(3)
        beats = []
        while len(beats) < 2:
            beats = [event for event in read_events(folder) if event.get("done") == 3]
    assert {(beat["label"], beat["total"]) for beat in beats} == {("prune", 4)}


def test_where_files_cannot_grow_they_are_written_anew_now_and_then(tmp_path, monkeypatch):
    monkeypatch.setattr(Folder, "appends", False)
    monkeypatch.setattr(module, "HEARTBEAT_SECONDS", 1000)
    writes, write = [], Folder.write_text
    monkeypatch.setattr(Folder, "write_text", lambda self, *file: (writes.append(time.monotonic()), write(self, *file)))
    monkeypatch.setattr(module, "REWRITE_SECONDS", 0.2)
    folder, events = Folder(str(tmp_path), "out"), Events()
    (tmp_path / FILE).write_text(json.dumps({"time": 0, "event": "run"}) + "\n")
    emitted = 0
    with events.recorded(folder, command="prune"):
        while len(writes) < 3:
            events.emit("progress")
            emitted += 1
            time.sleep(0.01)
    assert happened(tmp_path) == ["run", "run", *["progress"] * emitted, "done"]
    assert all(later - earlier >= 0.2 for earlier, later in pairwise(writes[:3]))


def test_events_wait_while_storage_is_away_and_hold_nobody_up(tmp_path, monkeypatch):
    folder, events = Folder(str(tmp_path), "out"), Events()
    append = Folder.append_text

    def fails(self, name, text):
        append(self, name, text[:10])
        raise StorageError("out", "the disk is full")

    with events.recorded(folder, command="prune"):
        while not happened(tmp_path):
            time.sleep(0.01)
        monkeypatch.setattr(Folder, "append_text", fails)
        for layer in range(3):
            events.emit("layer", layer=layer)
            time.sleep(0.05)
        monkeypatch.setattr(Folder, "append_text", append)
    assert happened(tmp_path) == ["run", "layer", "layer", "layer", "done"]
