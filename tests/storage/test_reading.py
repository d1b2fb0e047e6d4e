"""Every kind of file has one reader, and readers take files only."""

import ast
import math
import os
import re
from pathlib import Path

import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem

import shardprune
from shardprune.errors import InputError, StorageError
from shardprune.shard.likelihoods import perplexity_of
from shardprune.storage import whole_files
from shardprune.storage.folder import Folder
from shardprune.storage.malformed import Malformed
from shardprune.storage.sources import load_tokens, read_text
from shardprune.storage.text_file import decode
from shardprune.storage.whole_files import read_file

ROOT = Path(shardprune.__file__).parent
# The only files that may import what parses a format; lm-eval reads its tasks with a loader that it is given.
READERS = {"json": {"storage/json_file.py"}, "yaml": {"storage/yaml_file.py", "evaluation/task_code.py"}}


def test_nothing_else_parses_a_format():
    for file in ROOT.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [str(node.module)]
            for name in set(names) & READERS.keys():
                assert file.relative_to(ROOT).as_posix() in READERS[name], f"{file} imports {name}"
        loads = re.search(r"\b(np|numpy|torch|pickle)\.load\(", file.read_text())
        assert not loads, f"{file} has {loads}"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_text_in_every_encoding_with_a_mark(tmp_path, encoding):
    text = "one \u00e9 \u4e2d \U0001f600\n"
    mark = "\ufeff" if encoding.endswith("e") else ""
    assert decode((mark + text).encode(encoding)) == text
    (tmp_path / "x.txt").write_bytes((mark + text).encode(encoding))
    assert read_text("data", str(tmp_path / "x.txt")) == text
    assert Folder(str(tmp_path), "model").read_text("x.txt") == text


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"caf\xe9 au lait", "is not UTF-8 text: invalid continuation byte at byte 3"),
        (b"\xff\xfe\x00", "is not UTF-16 text: truncated data at byte 2"),
        (b"\xff\xfe\x00\xd8a\x00", "is not UTF-16 text: illegal UTF-16 surrogate at byte 2"),
        (b"\xed\xa0\x80", "is not UTF-8 text: invalid continuation byte at byte 0"),
    ],
)
def test_what_is_no_text(tmp_path, content, reason):
    with pytest.raises(Malformed, match=f"^{reason}$"):
        decode(content)
    (tmp_path / "x.txt").write_bytes(content)
    with pytest.raises(InputError, match=f"^data: '{tmp_path}/x.txt' {reason}$"):
        read_text("data", str(tmp_path / "x.txt"))


@pytest.fixture(params=["pipe", "link to a pipe", "device"])
def endless(tmp_path, request):
    if request.param == "device":
        return Path("/dev/zero")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "pipe")
    return tmp_path / ("link" if "link" in request.param else "pipe")


def test_devices_and_pipes_are_no_files(endless):
    reason = "it is a device or a pipe, not a file"
    with pytest.raises(InputError, match=f"^data: '{endless}' cannot be read: {reason}$"):
        read_file(str(endless), "data")
    with pytest.raises(StorageError, match=f"^model: {endless} cannot be read: {reason}$"):
        Folder(str(endless.parent), "model").read_bytes(endless.name)


def test_a_url_that_its_file_system_stumbles_over(monkeypatch):
    def info(_fs, path, **_options):
        return [][int(path == "")]

    monkeypatch.setattr(MemoryFileSystem, "info", info)
    with pytest.raises(InputError, match="^data: 'memory://x' cannot be read: list index out of range$"):
        read_file("memory://x", "data")


def test_a_directory_is_no_file(tmp_path):
    with pytest.raises(InputError, match=f"^data: '{tmp_path}' cannot be read: it is a directory, not a file$"):
        read_file(str(tmp_path), "data")


def test_a_file_that_memory_has_no_room_for(tmp_path, monkeypatch):
    with (tmp_path / "x.txt").open("wb") as file:
        file.truncate(10**13)  # without any blocks on the disk
    monkeypatch.setattr(whole_files, "host_memory", lambda: 16 * 10**9)
    reason = "cannot be read: it is read whole and has 10,000 GB; this machine's memory has room for 4.0 GB"
    with pytest.raises(InputError, match=f"^data: '{tmp_path}/x.txt' {reason}$"):
        read_file(str(tmp_path / "x.txt"), "data")
    with pytest.raises(StorageError, match=f"^model: {tmp_path}/x.txt {reason}$"):
        Folder(str(tmp_path), "model").read_bytes("x.txt")


def test_json_is_not_read_beyond_its_limit(tmp_path):
    with (tmp_path / "x.json").open("wb") as file:
        file.truncate(10**13)
    with pytest.raises(Malformed, match="^is too large for JSON here: 10,000,000,000,000 bytes, at most 100,000,000$"):
        Folder(str(tmp_path), "out").read_json("x.json")


def test_a_shape_of_no_whole_numbers_is_refused(tmp_path):
    np.save(tmp_path / "x.npy", np.zeros((4, 4), np.int64))
    content = (tmp_path / "x.npy").read_bytes()
    for shape in (b"(4., 4)", b"(True,4)"):
        (tmp_path / "x.npy").write_bytes(content.replace(b"(4, 4), }".ljust(len(shape) + 3), shape + b", }", 1))
        with pytest.raises(InputError, match="^data: .*x.npy' is (damaged|not a .npy array)"):
            load_tokens("data", str(tmp_path / "x.npy"), 100)


def test_a_perplexity_beyond_floats_is_infinite():
    assert perplexity_of(1e4) == math.inf
    assert perplexity_of(1.0) == math.e
