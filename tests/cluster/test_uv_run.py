"""A run under `uv run`: its workers have its Python, and its working directory stays where it is."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# Ray knows uv by its command line, of which these are the first two words; it starts the command that follows `--`.
UV = 'exec -a uv "$0" run --no-sync -- "$@"'
RUN = "import subprocess, sys; sys.exit(subprocess.run(sys.argv[sys.argv.index('--') + 1 :]).returncode)"
LOOK = """
import json
import shardprune.cluster.ray_backend
from ray._private.runtime_env.uv_runtime_env_hook import _get_uv_run_cmdline
from ray._private.ray_constants import RAY_ENABLE_UV_RUN_RUNTIME_ENV
print(json.dumps([bool(_get_uv_run_cmdline()), RAY_ENABLE_UV_RUN_RUNTIME_ENV]))
"""


def under_uv(folder: Path, *command: str, **variables: str) -> "subprocess.CompletedProcess[str]":
    (folder / "run").write_text(RUN)
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ENABLE_UV_RUN_RUNTIME_ENV"}
    environment |= {"PYTHONPATH": str(ROOT), **variables}
    words = ["bash", "-c", UV, sys.executable, sys.executable, *command]
    return subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("variables", "taken"),
    [({}, False), pytest.param({"RAY_ENABLE_UV_RUN_RUNTIME_ENV": "1"}, True, marks=pytest.mark.long)],
)
def test_rays_way_with_uv_is_taken_only_where_it_is_asked_for(tmp_path, variables, taken):
    done = under_uv(tmp_path, "-c", LOOK, **variables)
    assert json.loads(done.stdout) == [True, taken], done.stderr


@pytest.mark.long
def test_a_working_directory_that_ray_could_not_upload_does_not_matter(tmp_path, folder):
    (tmp_path / "model.safetensors").touch()
    os.truncate(tmp_path / "model.safetensors", 600 * 2**20)  # more than Ray takes
    tokens = str(folder / "tokens.npy")
    options = {"out": "out", "sparsity": "0.5", "calibration": tokens, "samples": "4", "seqlen": "24", "threads": "1"}
    words = [f"--{name}={value}" for name, value in options.items()]
    done = under_uv(tmp_path, "-m", "shardprune", "prune", str(folder / "model"), *words, "--no-report")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "result.json").exists()
