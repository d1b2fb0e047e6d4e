"""Whole commands from S3 to S3: the same to the bit as on local paths, whatever goes wrong on the way.

tests/failures has the same over Ray, whose workers are the server's clients by their nodes' environment."""

import json

import pytest

from shardprune.cli import main
from shardprune.errors import StorageError
from shardprune.storage.retrying import ENVIRONMENT
from tests.evaluation.material import evaluated
from tests.support.entries import entries
from tests.support.running import run, search_run
from tests.support.tiny import differing

SEARCH = {"path": "GL", "remove": 0.3, "depth_rule": "third-last"}


@pytest.fixture(scope="module")
def plain(local, tmp_path_factory):
    """What a run on local paths writes and measures."""
    out = tmp_path_factory.mktemp("plain")
    return out, run(local, out, sparsity=0.5, eval=(str(local / "other.npy"),))


def on_s3(remote, local, **fields):
    """A run whose model, data and output lie on S3."""
    sources = {"calibration": f"{remote}/tokens.npy", "eval": (f"{remote}/other.npy",)}
    return run(local, f"{remote}/out", model=f"{remote}/model", **{"sparsity": 0.5, **sources, **fields})


def assert_same(plain, s3, bucket, result, tmp_path):
    """The output on S3 is the local one, and nothing else lies there."""
    out, expected = plain
    assert differing(out, s3.get(f"{bucket}/out", tmp_path)) == []
    assert s3.names(f"{bucket}/out") == sorted(path.name for path in out.iterdir())
    assert s3.uploads(bucket) == []
    if expected.perplexity:
        assert [*result.perplexity.values()] == [*expected.perplexity.values()]


def everything_fails_once(faults):
    """What is read, written and removed at first meets an error, each time another one."""
    faults.answer(500, "GET .*config.json")
    faults.drop("body", "GET .*tokens.npy")
    faults.answer(429, "HEAD .*other.npy")
    faults.answer(500, r"GET .*\?.*prefix")
    faults.answer(429, "GET .*/model/model-00001", skip=3)
    faults.drop("body", "GET .*/model/model-00002", skip=15)
    faults.answer(500, "PUT .*/out/model-00001")
    faults.drop("answer", "PUT .*/out/model-00002", times=3)
    faults.answer(500, "PUT .*run.json")
    faults.answer(500, "PUT .*index.json")
    faults.drop("answer", "PUT .*result.json", times=3)
    faults.answer(500, "DELETE .*run.json")


def busy_for_longer(faults):
    faults.answer(503, "GET .*/model/model-00002", times=4, skip=15)
    faults.drop("request", "PUT .*/out/model-00003", times=6)


def away_in_every_phase(faults):
    faults.down_at("GET .*tokens.npy", 1)
    faults.down_at("PUT .*/out/model-00003", 1)
    faults.down_at("PUT .*/out/config.json", 1)


FAULTS = {fault.__name__: fault for fault in (everything_fails_once, away_in_every_phase, busy_for_longer)}


@pytest.mark.parametrize(
    "fault",
    entries(FAULTS, "everything_fails_once", "busy_for_longer"),
)
def test_a_run_gets_over_it(plain, s3, bucket, remote, local, tmp_path, fault):
    fault(s3.faults)
    result = on_s3(remote, local)
    assert any(request.fault for request in s3.requests)
    assert_same(plain, s3, bucket, result, tmp_path)


@pytest.mark.parametrize("ending", ["killed", pytest.param("storage stays away", marks=pytest.mark.long)])
def test_a_run_that_was_cut_off_goes_on(plain, s3, bucket, remote, local, tmp_path, monkeypatch, dies_at_layer, ending):
    if ending == "killed":
        dies_at_layer(2)
        with pytest.raises(KeyboardInterrupt):
            on_s3(remote, local)
    else:
        s3.faults.answer(500, "PUT .*/out/model-00004", times=float("inf"))
        with monkeypatch.context() as patience:
            patience.setenv(ENVIRONMENT, "0")
            with pytest.raises(StorageError, match=r"^out: .*00004.* cannot be written"):
                on_s3(remote, local)
    layers = [name for name in s3.names(f"{bucket}/out") if name.endswith("safetensors")]
    assert layers == ["model-00002-of-00005.safetensors", "model-00003-of-00005.safetensors"]
    s3.clear()
    result = on_s3(remote, local)
    assert_same(plain, s3, bucket, result, tmp_path)
    written = [request.path.rsplit("/", 1)[1] for request in s3.of("PUT .*safetensors$")]
    assert written == [f"model-0000{index}-of-00005.safetensors" for index in (4, 5, 1)]


def test_a_search_and_an_evaluation(s3, bucket, remote, local, tmp_path):
    search_run(local, tmp_path / "mop", **SEARCH)
    s3.faults.answer(500, "PUT .*safetensors", times=2)
    fields = {"calibration": f"{remote}/tokens.npy", **SEARCH}
    search_run(local, f"{remote}/mop", model=f"{remote}/model", **fields)
    fetched = s3.get(f"{bucket}/mop", tmp_path / "fetched")
    assert differing(tmp_path / "mop", fetched) == []
    assert sorted(s3.names(f"{bucket}/mop")) == sorted(path.name for path in (tmp_path / "mop").iterdir())

    settings = {"seqlen": 24, "wave": 4}
    expected = evaluated(tmp_path / "mop", perplexity=str(local / "other.npy"), **settings)
    s3.clear()
    s3.faults.answer(500, "PUT .*result.json")
    found = evaluated(f"{remote}/mop", perplexity=f"{remote}/other.npy", **settings)
    assert [*found.evaluation.perplexity.values()] == [*expected.evaluation.perplexity.values()]
    recorded = json.loads(s3.files.cat_file(f"{bucket}/mop/result.json"))
    assert recorded["evaluation"]["perplexity"][f"{remote}/other.npy"]["windows"] == 7
    assert recorded["command"] == "mop"


# -- what cannot work ---------------------------------------------------------------------------------------

REFUSED = {
    "an output that takes nothing": (
        lambda faults: faults.deny("PUT .*/out/"),
        {},
        "error: out: {}/out cannot be written: Access Denied",
    ),
    "an output that shows nothing": (
        lambda faults: faults.deny(r"GET .*\?.*prefix=out"),
        {},
        "error: out: {}/out cannot be listed: Access Denied",
    ),
    "an output that keeps everything": (
        lambda faults: faults.deny("DELETE .*/out/"),
        {},
        "error: out: {}/out cannot be written: Access Denied",
    ),
    "no such bucket": (lambda faults: None, {"out": "s3://no-such-bucket/out"}, "error: out: s3://no-such-bucket/out"),
    "a model that cannot be read": (
        lambda faults: faults.deny("(GET|HEAD) .*/model/"),
        {},
        "error: model: {}/model/config.json cannot be read: Forbidden",
    ),
    "data that cannot be read": (
        lambda faults: faults.deny("GET .*tokens.npy"),
        {},
        "error: calibration: '{}/tokens.npy' cannot be read: Access Denied",
    ),
    "the hub": (lambda faults: None, {"out": "hf://me/model"}, "error: out: hf://me/model cannot be written: "),
    "a path that cannot be": (lambda faults: None, {"out": "/proc/out"}, "error: out: /proc/out cannot be written: "),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_work_is_found_before_any_weight_is_read(s3, bucket, remote, capsys, name):
    fault, fields, message = REFUSED[name]
    fault(s3.faults)
    sources = ["--calibration", f"{remote}/tokens.npy", "--samples", "12", "--seqlen", "24"]
    out = fields.get("out", f"{remote}/out")
    with pytest.raises(SystemExit) as ended:
        main(["prune", f"{remote}/model", "--out", out, "--sparsity", "0.5", "--backend", "local", *sources])
    assert ended.value.code == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith(message.format(remote))
    if name != "an output that keeps everything":
        assert s3.names(f"{bucket}/out") == []
    samples = [request.bytes for request in s3.of("GET .*safetensors$") if not request.range.startswith("bytes=0-")]
    assert max(samples, default=0) <= 1024  # what tells models apart, and no whole tensor


def test_a_file_url_is_a_path(plain, local, tmp_path, dies_at_layer):
    fields = {"sparsity": 0.5, "calibration": f"file://{local}/tokens.npy", "eval": (f"file://{local}/other.npy",)}
    dies_at_layer(2)
    with pytest.raises(KeyboardInterrupt):
        run(local, f"file://{tmp_path}/out", model=f"file://{local}/model", **fields)
    result = run(local, tmp_path / "out", **fields)
    assert result.recipe["out"] == str(tmp_path / "out")
    assert result.recipe["model"] == str(local / "model")
    assert differing(plain[0], tmp_path / "out") == []
