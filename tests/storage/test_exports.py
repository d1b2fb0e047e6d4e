"""Exports from S3 to S3, and back: the same bytes as on local paths, whatever goes wrong on the way."""

import pytest

import shardprune
from shardprune.errors import StorageError
from shardprune.recipes.export import ExportRecipe
from shardprune.report.progress import Reporter
from shardprune.storage import owner
from tests.support.running import run
from tests.support.tiny import differing, snapshot


def exported(model, to, **fields):
    shardprune.export(ExportRecipe.checked({"model": str(model), "to": str(to), **fields}), Reporter(quiet=True))


@pytest.fixture(scope="module")
def half(local, tmp_path_factory):
    out = tmp_path_factory.mktemp("exports") / "half"
    run(local, out, sparsity=0.5, method="magnitude", measure_error=False)
    return out


@pytest.fixture(autouse=True)
def _no_wait(monkeypatch):
    monkeypatch.setattr(owner, "LOOK_SECONDS", 0.05)


def test_the_files_are_those_of_a_local_export(half, s3, bucket, tmp_path):
    s3.put(half, f"{bucket}/half")
    s3.faults.answer(500, "GET .*safetensors")
    s3.faults.answer(503, "PUT .*sparse-")
    exported(f"s3://{bucket}/half", f"s3://{bucket}/small", compression="zstd")
    exported(half, tmp_path / "small", compression="zstd")
    there = s3.get(f"{bucket}/small", tmp_path / "there")
    assert differing(there, tmp_path / "small") == []
    assert s3.names(f"{bucket}/small") == sorted(path.name for path in (tmp_path / "small").iterdir())
    exported(f"s3://{bucket}/small", f"s3://{bucket}/back", restore=True)
    back = snapshot(s3.get(f"{bucket}/back", tmp_path / "back"))
    assert back.items() <= snapshot(half).items()
    assert "result.json" in back
    assert s3.uploads(bucket) == []


def test_a_damaged_export_leaves_no_upload(half, s3, bucket, tmp_path):
    exported(half, tmp_path / "small")
    file = tmp_path / "small" / "sparse-model-00002-of-00005.safetensors"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(StorageError, match="is damaged"):
        exported(tmp_path / "small", f"s3://{bucket}/back", restore=True)
    assert "model-00002-of-00005.safetensors" not in s3.names(f"{bucket}/back")
    assert s3.uploads(bucket) == []
