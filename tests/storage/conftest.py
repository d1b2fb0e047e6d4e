"""One S3 server for all tests of this folder, which are its clients."""

import uuid

import pytest

from tests.support.s3 import client_of, serve
from tests.support.tiny import make_model, make_tokens
from tests.support.words import words_tokenizer


@pytest.fixture(scope="session")
def _s3():
    for package in ("s3fs", "moto.server", "flask_cors"):
        pytest.importorskip(package, reason=f"{package} is not installed: pip install 'shardprune[test]'")
    import s3fs

    with pytest.MonkeyPatch.context() as patch, serve() as s3, client_of(s3):
        patch.setattr(s3fs.S3FileSystem, "retries", 1)  # the client's own attempts, so that ours are seen
        yield s3


@pytest.fixture
def s3(_s3):
    """The server, with no fault and no request of another test."""
    _s3.clear()
    yield _s3
    _s3.clear()


@pytest.fixture
def bucket(s3):
    """A bucket of the test's own."""
    name = s3.bucket(f"bucket-{uuid.uuid4().hex[:8]}")
    s3.clear()
    return name


@pytest.fixture(scope="session")
def local(tmp_path_factory):
    """A folder with a model, tokens and a tokenizer."""
    folder = tmp_path_factory.mktemp("storage")
    words_tokenizer().save_pretrained(folder / "model")
    make_model(folder / "model", "llama-3.1", max_shard_size="60KB")
    make_tokens(folder / "tokens.npy")
    make_tokens(folder / "other.npy", samples=7, seed=1)
    return folder


@pytest.fixture
def remote(s3, bucket, local):
    """The same on S3: its URL."""
    for name in ("tokens.npy", "other.npy"):
        s3.put(local / name, f"{bucket}/{name}")
    s3.put(local / "model", f"{bucket}/model")
    return f"s3://{bucket}"
