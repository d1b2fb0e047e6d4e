"""Experts removed from and to object storage."""

import pytest

from shardprune import ExpertsRecipe, experts
from shardprune.report.progress import Reporter
from tests.support.architectures import MIXTURES, make_architecture
from tests.support.tiny import differing, make_tokens


@pytest.mark.long
def test_a_run_on_object_storage_and_another_from_its_statistics(s3, bucket, tmp_path):
    make_architecture(tmp_path / "model", "qwen3_moe", MIXTURES["qwen3_moe"])
    make_tokens(tmp_path / "tokens.npy")
    s3.put(tmp_path / "model", f"{bucket}/model")
    s3.clear()
    text = {"calibration": str(tmp_path / "tokens.npy"), "samples": 12}
    shared = {"seqlen": 24, "wave": 4, "backend": "local", "threads": 1, "report": False}

    def remove(place, out, **fields):
        values = {**shared, **fields, "model": f"{place}/model", "out": f"{place}/{out}"}
        return experts(ExpertsRecipe.checked(values), Reporter(quiet=True))

    s3.faults.answer(500, "PUT .*experts.json", times=2)
    for place in (tmp_path, f"s3://{bucket}"):
        remove(place, "out", keep=4, **text)
        remove(place, "less", keep=3, statistics=f"{place}/out")
    for out in ("out", "less"):
        fetched = s3.get(f"{bucket}/{out}", tmp_path / f"fetched-{out}")
        assert differing(tmp_path / out, fetched) == []
        assert sorted(s3.names(f"{bucket}/{out}")) == sorted(path.name for path in (tmp_path / out).iterdir())
