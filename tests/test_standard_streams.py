"""Readers of a command's output that have left, full disks and closed descriptors."""

import json
import os
import subprocess
import sys
from contextlib import contextmanager
from functools import partial

import pytest

from shardprune.cli import main
from shardprune.standard_streams import outputs
from tests.support.tiny import load_tensors


@contextmanager
def unread():
    """A stream into a pipe that nobody reads any more."""
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "w") as stream:
        yield stream
        assert os.readlink(f"/proc/self/fd/{stream.fileno()}") == os.devnull  # what is still written goes there


@pytest.fixture
def finished(folder):
    """The output of a run that `status` can show."""
    out = folder / "shown"
    out.mkdir(exist_ok=True)
    event = {"time": 1.0, "event": "run", "command": "prune", "fingerprint": "", "layers": 4}
    (out / "events.jsonl").write_text(f"{json.dumps(event)}\n")
    return out


def ended(*words) -> int:
    with pytest.raises(SystemExit) as end:
        main([str(word) for word in words])
    return end.value.code


def test_a_product_that_cannot_be_printed_is_one_line(finished, monkeypatch, capsys):
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert ended("status", finished, "--json") == 1
    assert capsys.readouterr().err == "error: standard output cannot be written: No space left on device\n"


def test_a_reader_that_has_left_is_left_alone(finished, monkeypatch, capsys):
    with unread() as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        assert ended("status", finished, "--json") == 0
    assert capsys.readouterr().err == ""


STREAMS = {"full": partial(open, "/dev/full", "w"), "unread": unread}


@pytest.mark.parametrize("out", STREAMS)
@pytest.mark.parametrize("err", STREAMS)
def test_no_stream_ends_a_run(folder, tmp_path, monkeypatch, out, err):
    command = ["prune", folder / "model", "--out", tmp_path / "o", "--backend", "local", "--sparsity", "0.5"]
    command += ["--calibration", folder / "tokens.npy", "--samples", "4", "--seqlen", "24", "--no-report"]
    with STREAMS[out]() as stdout, STREAMS[err]() as stderr:
        monkeypatch.setattr(sys, "stdout", stdout)
        monkeypatch.setattr(sys, "stderr", stderr)
        assert ended(*command) == 0
        monkeypatch.undo()
    assert len(load_tensors(tmp_path / "o")) > 30
    assert (tmp_path / "o" / "result.json").exists()


def test_a_run_says_that_its_summary_is_lost(folder, tmp_path, monkeypatch, capsys):
    command = ["prune", folder / "model", "--out", tmp_path / "o", "--backend", "local", "--sparsity", "0.5"]
    command += ["--calibration", folder / "tokens.npy", "--samples", "4", "--seqlen", "24", "--no-report"]
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert ended(*command) == 0
    reason = "standard output cannot be written (No space left on device); the result is in"
    assert capsys.readouterr().err.splitlines()[-1] == f"{reason} {tmp_path / 'o'}"


def test_text_that_an_encoding_lacks_is_escaped(tmp_path, monkeypatch):
    with open(tmp_path / "text", "w", encoding="ascii") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        with outputs() as (out, _):
            print("h\u00e9 \ud800")
            assert out.failure is None
        monkeypatch.undo()
    assert (tmp_path / "text").read_text() == "h\\xe9 \\ud800\n"


def test_nothing_is_said_at_the_exit_of_a_process(finished):
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "shardprune", "status", str(finished)]
    try:
        done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True)
    finally:
        os.close(writing)
    assert (done.returncode, done.stderr) == (0, "")


def test_no_file_takes_the_place_of_a_closed_descriptor(finished):
    code = (
        "import os, sys\n"
        "for number in (0, 1): os.close(number)\n"
        "from shardprune.process import run\n"
        "def command():\n"
        "    with open(sys.argv[1], 'w') as file:\n"
        "        assert file.fileno() > 2, file.fileno()\n"
        "        os.write(1, b'what a library prints')\n"
        "        print('product')\n"
        "    return 0\n"
        "run(command)\n"
    )
    file = finished / "file"
    done = subprocess.run([sys.executable, "-c", code, str(file)], stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (1, "error: standard output cannot be written: it is closed\n")
    assert file.read_text() == ""


HOLDS = """
import os, sys
from shardprune.errors import InputError
from shardprune.storage.retrying import preflight
from shardprune.standard_streams import outputs, without_libraries

with outputs():
    with without_libraries():
        for refused in (False, True):
            try:
                with preflight(), preflight():
                    print("python", refused)
                    os.write(1, f"C {refused}\\n".encode())
                    os.system(f"echo child {refused}")
                    if refused:
                        raise InputError("field", "no")
            except InputError:
                pass
        print("at work")
    print("product")
"""


def test_what_libraries_print_is_no_product_and_no_part_of_a_refusal():
    done = subprocess.run([sys.executable, "-c", HOLDS], capture_output=True, text=True, timeout=200)
    assert done.stdout == "product\n"
    assert sorted(done.stderr.splitlines()) == ["C False", "at work", "child False", "python False"]
