"""Folders on local paths and in memory; tests/storage has them on object storage."""

import os

import pytest

from shardprune.errors import InputError, StorageError
from shardprune.storage.folder import Folder
from shardprune.storage.locations import absolute
from shardprune.storage.whole_files import read_file
from tests.support.tiny import snapshot


@pytest.mark.parametrize("inside", ["", "new", "new/and/deeper"])
def test_looking_whether_it_can_be_written_leaves_nothing(tmp_path, inside):
    (tmp_path / "kept").write_text("as it is")
    for place in (str(tmp_path / inside), f"file://{tmp_path}/{inside}", f"memory://{tmp_path.name}/{inside}"):
        folder = Folder(place, "out")
        folder.check_writable()
        assert [name for name in folder.names() if name != "kept"] == []
    assert snapshot(tmp_path) == {"kept": b"as it is"}
    assert os.listdir(tmp_path) == ["kept"]


@pytest.mark.parametrize("place", ["/proc/new", "/dev/null/below", "http://127.0.0.1:1/new", "hf://me/model"])
def test_what_cannot_be_written_is_an_input_error(place):
    with pytest.raises(InputError, match=f"^out: {place} cannot be written: "):
        Folder(place, "out").check_writable()


@pytest.mark.parametrize(
    ("url", "problem"),
    [
        ("a\0b", r"'a\\x00b' holds a character that no file's name has"),
        ("a\ud800b", r"'a\\ud800b' holds a character that no file's name has"),
        ("hf://", "'hf://' names no place; give what stands after ://, too"),
        ("s3://", "'s3://' names no place; give what stands after ://, too"),
        ("reference://x", "'reference://x' cannot be opened: "),
        ("generic://x", "'generic://x' cannot be opened: "),
        ("nothing://x", "'nothing://x' cannot be opened: Protocol not known: nothing"),
        ("tar://x", "'tar://x' cannot be opened: "),
    ],
)
def test_urls_of_nothing(url, problem):
    for opened in (lambda: Folder(url, "model"), lambda: read_file(url, "model")):
        with pytest.raises(InputError, match=f"^model: {problem}"):
            opened()


def test_a_failing_disk_is_a_storage_error(tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(StorageError, match="^model: .*folder cannot be read: "):
        Folder(str(tmp_path), "model").read_bytes("folder")


def test_an_error_of_what_is_written_stays_what_it_is(tmp_path):
    def parts():
        yield b"half"
        raise KeyError("a bug")

    with pytest.raises(KeyError, match="a bug"):
        Folder(str(tmp_path), "out").write("x", parts)
    assert os.listdir(tmp_path) == []


def test_paths_mean_the_same_to_every_process(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert absolute("x/y") == absolute(f"file://{tmp_path}/x/y") == f"{tmp_path}/x/y"
    assert absolute("s3://b/x") == "s3://b/x"
