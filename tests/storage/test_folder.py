"""Files on a real S3 server: what is asked of it, what others see meanwhile, and what goes wrong."""

import importlib.util
import logging
import pickle

import pytest
import torch
from huggingface_hub.utils import get_session

from shardprune.errors import InputError, StorageError
from shardprune.model.checkpoint import Checkpoint
from shardprune.storage.folder import CLIENTS, REQUEST, Folder
from shardprune.storage.retrying import ENVIRONMENT
from shardprune.storage.safetensors_file import read_header, read_tensor, write_tensors
from tests.support.tiny import load_tensors

MIB = 2**20


@pytest.fixture
def folder(bucket) -> Folder:
    return Folder(f"s3://{bucket}/run", "out")


@pytest.fixture
def small_parts(monkeypatch):
    """Uploads go out in the smallest parts that S3 takes."""
    import s3fs

    monkeypatch.setattr(s3fs.S3FileSystem, "default_block_size", 5 * MIB)
    s3fs.S3FileSystem.clear_instance_cache()
    yield
    s3fs.S3FileSystem.clear_instance_cache()


def parts(count: int = 3):
    for number in range(count):
        yield bytes([number]) * (6 * MIB)


WHOLE = b"".join(parts())


# -- reading --------------------------------------------------------------------------------------------------


def test_one_tensor_is_one_request_for_its_bytes(s3, remote, local):
    checkpoint = Checkpoint(f"{remote}/model")
    tensors = load_tensors(local / "model")
    for name in sorted(tensors)[::6]:
        s3.clear()
        assert torch.equal(checkpoint.read(name), tensors[name])
        entry = checkpoint.entries[name]
        (request,) = s3.requests
        assert request.path.endswith(entry.file)
        assert request.range == f"bytes={entry.start}-{entry.end - 1}"
        assert request.bytes == entry.end - entry.start


def test_opening_a_checkpoint_reads_headers_only(s3, bucket, tmp_path):
    write_tensors(Folder(f"s3://{bucket}/x", "out"), "x.safetensors", {"big": torch.zeros(4 * MIB)}, {})
    s3.clear()
    entries, _ = read_header(Folder(f"s3://{bucket}/x", "model"), "x.safetensors")
    assert entries["big"].shape == (4 * MIB,)
    assert [request.method for request in s3.requests] == ["HEAD", "GET"]
    assert sum(request.bytes for request in s3.requests) <= 64 * 2**10


def test_a_long_header_is_read_whole(folder):
    tensors = {f"a.rather.long.name.of.a.tensor.{number}": torch.tensor([number]) for number in range(2000)}
    write_tensors(folder, "x.safetensors", tensors, {})
    entries, _ = read_header(folder, "x.safetensors")
    assert entries.keys() == tensors.keys()
    assert torch.equal(read_tensor(folder, entries["a.rather.long.name.of.a.tensor.1234"]), torch.tensor([1234]))


def test_a_large_tensor_is_read_by_several_requests_at_a_time(s3, folder):
    content = torch.arange(9 * REQUEST // 4 // 8, dtype=torch.int64)
    write_tensors(folder, "x.safetensors", {"large": content}, {})
    entries, _ = read_header(folder, "x.safetensors")
    s3.clear()
    s3.faults.answer(500, "GET", times=1)
    assert torch.equal(read_tensor(folder, entries["large"]), content)
    answered = [request.bytes for request in s3.requests if request.status == 206]
    assert set(answered) == {REQUEST, REQUEST // 4}


def test_a_file_that_ends_early_says_so(folder):
    folder.write_bytes("x", bytes(100))
    with pytest.raises(StorageError, match=r"^out: .*/x cannot be read: it ends at byte 100, 20 bytes early$"):
        folder.read_into("x", 60, memoryview(bytearray(60)))
    with pytest.raises(StorageError, match=r"^out: .*/x cannot be read: it ends at byte 100, 30 bytes early$"):
        folder.read_range("x", 60, 130)


def test_what_others_do_is_seen_at_once(s3, bucket, folder):
    assert folder.names() == []
    assert not folder.is_file("x")
    s3.files.pipe_file(f"{bucket}/run/x", b"1")
    assert folder.names() == ["x"]
    assert folder.is_file("x")
    s3.files.rm_file(f"{bucket}/run/x")
    assert not folder.is_file("x")
    assert folder.names() == []


# -- writing --------------------------------------------------------------------------------------------------


def test_an_upload_of_several_parts_shows_when_it_is_complete(s3, bucket, folder, small_parts):
    folder = Folder(folder.url, "out")

    def watched():
        for part in parts():
            yield part
            assert folder.names() == []
            assert s3.names(bucket) == []

    folder.write("x", watched)
    assert [request.operation.partition("?")[2] for request in s3.of("/run/x")] == [
        "uploads",
        *["partNumber&uploadId"] * 3,
        "uploadId",
    ]
    assert folder.read_bytes("x") == WHOLE


UPLOAD_FAULTS = {
    "it cannot start": lambda faults: faults.answer(500, r"POST .*\?uploads", times=2),
    "a part is refused": lambda faults: faults.answer(500, "PUT .*partNumber", times=1, skip=1),
    "a part is cut off": lambda faults: faults.drop("request", "PUT .*partNumber", times=3, skip=2),
    "it cannot end": lambda faults: faults.answer(500, r"POST .*\?uploadId", times=1),
    "it ends unheard": lambda faults: faults.drop("answer", r"POST .*\?uploadId", times=3),
    "it is away for a while": lambda faults: faults.down_at("PUT .*partNumber", 1, skip=1),
}


@pytest.mark.parametrize("fault", UPLOAD_FAULTS.values(), ids=UPLOAD_FAULTS)
def test_an_upload_that_fails_is_made_again(s3, bucket, folder, small_parts, fault):
    folder = Folder(folder.url, "out")
    fault(s3.faults)
    folder.write("x", parts)
    assert s3.files.cat_file(f"{bucket}/run/x") == WHOLE
    assert any(request.fault for request in s3.requests)
    assert s3.uploads(bucket) == []


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_upload_that_is_given_up_leaves_nothing(s3, bucket, folder, small_parts, error):
    folder = Folder(folder.url, "out")

    def broken():
        yield from parts()
        raise error("out of luck")

    with pytest.raises(error, match="out of luck"):
        folder.write("x", broken)
    assert s3.names(bucket) == []
    assert s3.uploads(bucket) == []


# -- failures -------------------------------------------------------------------------------------------------

OPERATIONS = {
    "names": ("GET", lambda folder: folder.names() == ["x"]),
    "is_file": ("HEAD", lambda folder: folder.is_file("x")),
    "read_range": ("GET", lambda folder: folder.read_range("x", 1, 3) == b"el"),
    "read_bytes": ("HEAD", lambda folder: folder.read_bytes("x") == b"hello"),
    "write": ("PUT", lambda folder: folder.write_bytes("y", b"1") or folder.read_bytes("y") == b"1"),
    "remove": ("DELETE", lambda folder: folder.remove("x") or folder.names() == []),
    "remove_folder": ("GET", lambda folder: folder.remove_folder("sub") or folder.names() == ["x"]),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_error_that_passes_does_not_show(s3, folder, name):
    folder.write_bytes("x", b"hello")
    s3.clear()
    method, operation = OPERATIONS[name]
    s3.faults.answer(500, method, times=1)
    s3.faults.answer(429, method, times=1)
    assert operation(folder)
    assert [request.fault for request in s3.requests if request.fault] == ["500", "429"]


def test_a_removal_whose_answer_is_lost_is_one(s3, folder):
    folder.write_bytes("x", b"1")
    s3.faults.drop("answer", "DELETE", times=1)
    folder.remove("x")
    folder.remove("x")
    assert folder.names() == []


@pytest.mark.parametrize("name", ["run[1]", "run*", "run?"])
@pytest.mark.parametrize("storage", ["s3", "memory", "local"])
def test_a_name_is_no_pattern(request, storage, name, tmp_path):
    """What other runs' names match stays theirs."""
    place = {"s3": "s3://{}", "memory": f"memory://{tmp_path.name}", "local": str(tmp_path)}[storage]
    if storage == "s3":
        place = place.format(request.getfixturevalue("bucket"))
    own, other = Folder(f"{place}/{name}", "out"), Folder(f"{place}/run1", "out")
    for folder in (own, other):
        for file in ("a.txt", "state/b.txt", "state/deep/c.txt"):
            folder.write_text(file, folder.url)
    assert own.read_text("a.txt") == own.url
    own.remove_folder("state")
    own.remove("a.txt")
    assert [own.is_file(file) for file in ("a.txt", "state/b.txt", "state/deep/c.txt")] == [False] * 3
    assert "state" not in own.names()
    assert [other.is_file(file) for file in ("a.txt", "state/b.txt", "state/deep/c.txt")] == [True] * 3


@pytest.mark.parametrize("name", OPERATIONS)
def test_what_is_denied_is_an_error_and_not_an_absence(s3, folder, name):
    folder.write_bytes("x", b"hello")
    method, operation = OPERATIONS[name]
    s3.faults.deny(method)
    with pytest.raises(StorageError, match=r"^out: s3://.*(Access Denied|Forbidden)$"):
        operation(folder)
    assert len([request for request in s3.requests if request.fault]) == 1  # and is not tried again


def test_patience_ends_in_one_line(s3, folder, monkeypatch, caplog):
    monkeypatch.setenv(ENVIRONMENT, "1")
    s3.faults.down()
    with (
        pytest.raises(StorageError, match=r"^out: s3://.*/run/x cannot be read: Could not connect") as caught,
        caplog.at_level(logging.WARNING),
    ):
        folder.read_bytes("x")
    waits = [message for message in caplog.messages if "trying again" in message]
    assert len(waits) >= 2
    again = pickle.loads(pickle.dumps(caught.value))
    assert (str(again), again.field) == (str(caught.value), "out")
    for text in (str(caught.value), caplog.text):
        assert not any(value in text for name, value in s3.environment.items() if "KEY" in name)


def test_a_storage_without_credentials(s3, bucket, monkeypatch, tmp_path):
    import s3fs

    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "absent"))
    s3fs.S3FileSystem.clear_instance_cache()
    try:
        with pytest.raises(StorageError, match="cannot be read: Unable to locate credentials"):
            Folder(f"s3://{bucket}/run", "model").read_bytes("x")
    finally:
        s3fs.S3FileSystem.clear_instance_cache()


@pytest.mark.skipif(importlib.util.find_spec("gcsfs") is not None, reason="gcsfs is installed")
def test_a_missing_package_is_named():
    with pytest.raises(InputError, match=r"^out: 'gs://b/x' needs .*: pip install 'shardprune\[gcs\]'$"):
        Folder("gs://b/x", "out")


def test_what_the_hub_is_asked_with_is_a_client_of_storage():
    """Whose errors are told in one line: huggingface_hub has changed it before."""
    packages = {base.__module__.partition(".")[0] for base in type(get_session()).__mro__}
    assert packages & CLIENTS
