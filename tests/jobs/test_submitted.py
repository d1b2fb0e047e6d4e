"""Jobs on a standing cluster, submitted as users submit them."""

import sysconfig
import time
import venv
from contextlib import suppress
from pathlib import Path

import pytest
import yaml

from shardprune import Recipe, prune
from shardprune.recipes.demo import bundled_model
from shardprune.report.progress import Reporter
from tests.jobs.head import REPOSITORY, Head, head, is_told_to_stop
from tests.support.tiny import differing, make_tokens

RECIPE = {
    "model": bundled_model(),
    "sparsity": 0.5,
    "samples": 48,
    "seqlen": 256,
    "device": "cpu",
    "threads": 1,
}
# Whether driver and worker run what was submitted, and agree on what has to be the same; then a command that fails.
LOOK = """
import os, ray, sys
from importlib.util import find_spec
look = lambda: (os.getcwd(), find_spec("shardprune").origin, os.environ["RAY_ENABLE_ZERO_COPY_TORCH_TENSORS"])
ray.init(logging_level="ERROR")
for here, file, flag in (look(), ray.get(ray.remote(look).remote())):
    assert "working_dir_files" in here and file == f"{here}/shardprune/__init__.py", file
    assert flag == "1"
print("submitted", flush=True)
ray.shutdown()
os.execvp("python", ["python", "-m", *sys.argv[1:]])
"""
# Which Python runs a driver and a worker; connected as a run is.
WHERE = """
import ray, sys
from shardprune.cluster.ray_backend import RayBackend
RayBackend(None, patience=60.0).slots()
print("ran in", sys.prefix, ray.get(ray.remote(lambda: sys.prefix).remote()), flush=True)
"""


@pytest.fixture(scope="module")
def cluster():
    with head() as standing:
        yield standing


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("jobs")
    recipe = {**RECIPE, "calibration": make_tokens(folder / "tokens.npy", RECIPE["samples"], RECIPE["seqlen"])}
    (folder / "good.yaml").write_text(yaml.safe_dump(recipe))
    return folder


def test_a_job_waits_runs_what_was_submitted_and_ends_as_its_command_does(cluster: Head, folder: Path):
    """What else jobs refuse is in test_entry.py; the good.yaml lies outside the working directory."""
    failing = ["jobs.prune", str(folder / "good.yaml"), "--out=runs/lost"]
    submitted = cluster.submit("python", "-m", "jobs.with_gpus", "2", "python", "-c", LOOK, *failing)
    output, _ = submitted.communicate()
    assert submitted.returncode == 1, output
    said = [line for line in output.splitlines() if " cli.py:" not in line and " sdk.py:" not in line]
    assert [line for line in said if line.strip()][-2:] == [
        "submitted",
        "error: out: 'runs/lost' would be lost with this job's copy of the working directory; "
        "use an absolute path or a URL",
    ]


@pytest.mark.long
def test_a_stopped_job_keeps_its_layers_and_the_next_one_goes_on(cluster: Head, folder: Path):
    out = folder / "out"
    command = ["python", "-m", "jobs.prune", str(folder / "good.yaml"), "--out", str(out)]
    assert cluster.submit(*command, wait=False, name="first").wait() == 0
    driver = wait_until(lambda: cluster.command("jobs.prune"))
    wait_until(lambda: layers(out))
    driver.suspend()  # `ray job stop` takes seconds to say so, which is more than all layers take
    stop = cluster.job("stop", "first")
    wait_until(lambda: is_told_to_stop(driver))
    driver.resume()
    assert stop.wait() == 0
    kept = layers(out)
    assert 1 <= len(kept) < 8
    log, _ = cluster.job("logs", "first").communicate()
    assert "error: stopped by SIGTERM" in log.strip().splitlines()[-1]
    wait_until(lambda: not cluster.busy())

    output, _ = (second := cluster.submit(*command)).communicate()
    assert second.returncode == 0, output
    assert {name: time for name, time in layers(out).items() if name in kept} == kept
    alone = Recipe.load(folder / "good.yaml", {"out": str(folder / "local"), "backend": "local"})
    prune(alone, Reporter(quiet=True))
    assert differing(out, folder / "local") == []


@pytest.mark.long
def test_workers_run_in_the_python_that_the_runtime_environment_names(cluster: Head, tmp_path: Path):
    venv.create(tmp_path / "env", with_pip=False)
    (packages,) = tmp_path.glob("env/lib/python*/site-packages")
    (packages / "packages.pth").write_text(sysconfig.get_path("purelib") + "\n")
    python = str(tmp_path / "env" / "bin" / "python")
    environment = yaml.safe_load((REPOSITORY / "ray_configs" / "runtime_env.yaml").read_text())
    (tmp_path / "env.yaml").write_text(yaml.safe_dump({**environment, "py_executable": python}))
    submitted = cluster.submit(python, "-c", WHERE, environment=tmp_path / "env.yaml")
    output, _ = submitted.communicate()
    assert f"ran in {tmp_path / 'env'} {tmp_path / 'env'}" in output


def layers(out: Path) -> dict[str, int]:
    """When each finished layer was written, in nanoseconds."""
    with suppress(FileNotFoundError):  # the folder may come and go while a run begins
        files = list(out.glob("model-*.safetensors"))
        return {file.name: file.stat().st_mtime_ns for file in files if "model-00001-" not in file.name}
    return {}


def wait_until(found, seconds: float = 240.0):
    """What is found, once it is."""
    deadline = time.monotonic() + seconds
    while not (it := found()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return it
