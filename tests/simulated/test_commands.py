"""Whole runs of the commands on the simulated GPU write what they write on the CPU."""

import shutil

import pytest

from shardprune import EvaluateRecipe, MopRecipe, RebuildRecipe, Recipe, evaluate, mop, prune, rebuild
from shardprune.cli import main
from shardprune.report.progress import Reporter
from tests.simulated.agreement import check_same
from tests.simulated.bounds import TOLERANCE
from tests.support.entries import entries
from tests.support.simulated_cuda import needs_simulated_cuda, simulated_cuda

pytestmark = needs_simulated_cuda
QUIET = Reporter(quiet=True)


def fields(folder, device: str, out, **changed) -> dict:
    return {
        "model": str(folder / "model"),
        "out": str(out),
        "calibration": str(folder / "tokens.npy"),
        "samples": 4,
        "seqlen": 24,
        "wave": 2,
        "threads": 1,
        "backend": "local",
        "dtype": "float32",
        "device": device,
        "report": False,
        **changed,
    }


EVALUATED = object()  # stands for the tokens, on which perplexity is measured before and after
RUNS = {
    "resident, evaluated": {"sparsity": 0.5, "eval": EVALUATED},
    "streamed, evaluated": {"sparsity": 0.5, "weights": "streamed", "eval": EVALUATED},
    "2:4, waves on the host": {"pattern": "2:4", "activations": "host"},
    "mixed N:M": {"pattern": "mixed:4", "sparsity": 0.5},
    "replicas' sums": {"sparsity": 0.5, "replicas": 2},
    "outliers of replicas": {"sparsity": 0.5, "replicas": 2, "method": "wanda", "allocation": "owl"},
    "Mosaic": {"sparsity": 0.5, "allocation": "mosaic"},
    "parallel, two shards": {"sparsity": 0.5, "propagation": "parallel", "shards": 2},
    "magnitude": {"sparsity": 0.5, "method": "magnitude"},
    "masks rebuilt": {"sparsity": 0.5, "method": "wanda", "rebuild": "barber", "rebuild_metric": "weight"},
    "dense stream, waves on the host": {"sparsity": 0.5, "targets": "stream", "samples": 8, "activations": "host"},
    "dense stream, streamed, replicas": {
        "pattern": "2:4",
        "targets": "stream",
        "samples": 8,
        "weights": "streamed",
        "replicas": 2,
    },
    "structures, corrected": {"structured": 0.2},
    "structures by AMP": {"structured": 0.2, "score": "amp"},
    "structures by outliers, replicas": {"structured": 0.2, "score": "outlier", "replicas": 2},
    "structures and zeros": {"structured": 0.2, "sparsity": 0.5, "method": "wanda"},
}


@pytest.mark.parametrize(
    "name",
    entries(
        list(RUNS),
        "resident, evaluated",
        "outliers of replicas",
        "replicas' sums",
        "structures by AMP",
        "structures and zeros",
        "dense stream, waves on the host",
        "Mosaic",
    ),
)
def test_prune(folder, tmp_path, name):
    changed = {key: str(folder / "tokens.npy") if value is EVALUATED else value for key, value in RUNS[name].items()}
    if "eval" in changed:
        changed["eval"] = (changed["eval"],)
    here = prune(Recipe.checked(fields(folder, "cpu", tmp_path / "cpu", **changed)), QUIET)
    with simulated_cuda() as gpu:
        there = prune(Recipe.checked(fields(folder, "cuda", tmp_path / "cuda", **changed)), QUIET)
    assert gpu.counts.total().launches > 0
    exact = changed.get("method") in ("wanda", "magnitude") and "structured" not in changed
    check_same(tmp_path / "cuda", tmp_path / "cpu", 0.0 if exact else TOLERANCE)
    assert there.perplexity.keys() == here.perplexity.keys()
    for source, found in there.perplexity.items():
        assert found.after == pytest.approx(here.perplexity[source].after, rel=1e-5)
    assert [worker.peak_bytes > 0 for worker in there.workers] == [True] * len(there.workers)


def test_rebuild(folder, tmp_path):
    prune(Recipe.checked(fields(folder, "cpu", tmp_path / "sparse", sparsity=0.5, method="magnitude")), QUIET)
    values = {"rebuild_metric": "weight", "sparse": str(tmp_path / "sparse")}
    rebuild(RebuildRecipe.checked(fields(folder, "cpu", tmp_path / "cpu", **values)), QUIET)
    with simulated_cuda():
        rebuild(RebuildRecipe.checked(fields(folder, "cuda", tmp_path / "cuda", **values)), QUIET)
    check_same(tmp_path / "cuda", tmp_path / "cpu", 0.0)


@pytest.mark.parametrize(
    "changed",
    [
        {"path": "GL", "score": "obs"},
        {"remove": 0.1, "criterion": "kl"},
        {"remove": 0.1, "criterion": "cosine", "depth_rule": "cosine", "replicas": 2},
    ],
    ids=["path", "kl", "cosine, replicas"],
)
def test_mop(folder, tmp_path, changed):
    here = mop(MopRecipe.checked(fields(folder, "cpu", tmp_path / "cpu", **changed)), QUIET)
    with simulated_cuda():
        there = mop(MopRecipe.checked(fields(folder, "cuda", tmp_path / "cuda", **changed)), QUIET)
    assert there.structure.after == here.structure.after
    check_same(tmp_path / "cuda", tmp_path / "cpu", TOLERANCE)


@pytest.mark.parametrize("weights", ["resident", "streamed"])
def test_evaluate(folder, tmp_path, weights):
    shutil.copytree(folder / "model", tmp_path / "model")
    tokens = str(folder / "tokens.npy")
    asked = {"model": str(tmp_path / "model"), "perplexity": (tokens,), "seqlen": 24, "threads": 1, "backend": "local"}
    asked |= {"dtype": "float32", "weights": weights}
    here = evaluate(EvaluateRecipe.checked({**asked, "device": "cpu"}), QUIET)
    with simulated_cuda():
        there = evaluate(EvaluateRecipe.checked({**asked, "device": "cuda"}), QUIET)
    (found,), (expected,) = there.evaluation.perplexity.values(), here.evaluation.perplexity.values()
    assert found.value == pytest.approx(expected.value, rel=1e-5)


# -- errors are one line --------------------------------------------------------------------------------------------


def run(folder, out, capsys, *options: str) -> tuple[int, str]:
    """Run `shardprune prune` in this process; the exit code, and what it said of an error."""
    arguments = ["prune", str(folder / "model"), "--out", str(out), "--calibration", str(folder / "tokens.npy")]
    arguments += ["--sparsity", "0.5", "--samples", "4", "--seqlen", "24", "--backend", "local", "--no-report"]
    with pytest.raises(SystemExit) as ended:
        main([*arguments, "--device", "cuda", *options])
    return ended.value.code, capsys.readouterr().err


def test_a_gpu_that_is_too_small_ends_the_run_with_one_line(folder, tmp_path, capsys):
    with simulated_cuda() as gpu:
        gpu.memory = gpu.allocated + 150_000  # the rest is another process's
        code, said = run(folder, tmp_path / "o", capsys)
    assert code == 1
    last = said.strip().splitlines()[-1]
    assert last.startswith("error: worker 0.0, ")
    assert "its device is too small (CUDA out of memory. Tried to allocate" in last
    assert "Traceback" not in said


def test_an_environment_that_forces_tf32_is_refused_before_any_work(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "1")
    with simulated_cuda():
        code, said = run(folder, tmp_path / "o", capsys)
    assert code == 2
    (line,) = said.strip().splitlines()
    assert line.startswith("error: NVIDIA_TF32_OVERRIDE: '1' makes CUDA round float32 to TF32 everywhere; ")
    assert not (tmp_path / "o").exists()
