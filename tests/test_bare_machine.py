"""One process on one GPU needs torch, transformers and what these bring, and nothing of what clusters, reports and
trainings need."""

import subprocess
import sys

import pytest

from tests.support.simulated_cuda import needs_simulated_cuda

ABSENT = ("ray", "deepspeed", "datasets", "lm_eval", "plotly", "jinja2", "accelerate", "peft", "scipy", "tensorboardX")
WITHOUT = f"""
from importlib.machinery import PathFinder

find = PathFinder.find_spec

def find_spec(name, path=None, target=None):
    return None if name.partition(".")[0] in {ABSENT} else find(name, path, target)

PathFinder.find_spec = staticmethod(find_spec)
"""


def carry_out(program: str) -> str:
    done = subprocess.run([sys.executable, "-c", WITHOUT + program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def words(folder, out, device: str) -> list[str]:
    options = {"--calibration": str(folder / "tokens.npy"), "--eval": str(folder / "tokens.npy"), "--out": str(out)}
    options |= {"--sparsity": "0.5", "--samples": "4", "--seqlen": "24", "--backend": "local", "--threads": "1"}
    flat = [word for option in options.items() for word in option]
    return ["prune", str(folder / "model"), *flat, "--device", device, "--no-report"]


def test_the_command_line_prunes(folder, tmp_path):
    program = f"from shardprune.cli import main; main({words(folder, tmp_path / 'o', 'cpu')})"
    assert "sparsity" in carry_out(program)
    assert (tmp_path / "o" / "result.json").exists()


@needs_simulated_cuda
@pytest.mark.long
def test_the_command_line_prunes_on_a_gpu(folder, tmp_path):
    program = f"""
from tests.support.simulated_cuda import simulated_cuda
from shardprune.cli import main
with simulated_cuda():
    main({words(folder, tmp_path / "o", "cuda")})
"""
    assert "sparsity" in carry_out(program)
    assert (tmp_path / "o" / "result.json").exists()


def test_python_prunes_rebuilds_and_searches_and_the_benchmark_is_imported(folder, tmp_path):
    program = f"""
from importlib import import_module
from benchmarks.gpu.steps import STEPS
for name in STEPS:
    import_module("benchmarks.gpu." + name)
from shardprune import MopRecipe, RebuildRecipe, Recipe, mop, prune, rebuild
common = dict(model={str(folder / "model")!r}, calibration={str(folder / "tokens.npy")!r}, samples=4, seqlen=24)
common |= dict(backend="local", threads=1, report=False)
prune(Recipe(out={str(tmp_path / "half")!r}, sparsity=0.5, **common))
rebuild(RebuildRecipe(out={str(tmp_path / "rebuilt")!r}, sparse={str(tmp_path / "half")!r}, **common))
mop(MopRecipe(out={str(tmp_path / "small")!r}, path="L", **common))
"""
    carry_out(program)
    assert all((tmp_path / name / "result.json").exists() for name in ("half", "rebuilt", "small"))


def test_what_needs_an_extra_names_it(folder, tmp_path):
    model, text, out = str(folder / "model"), str(folder / "tokens.npy"), str(tmp_path / "o")
    common = ["--out", out, "--backend", "local"]
    asked = [
        ["evaluate", model, "--tasks", "boolq", *common],
        ["experts", model, "--remove", "0.25", "--merge", "--calibration", text, *common],
        ["recover", model, "--data", text, *common],
        ["report", out],
        [*words(folder, tmp_path / "half", "cpu")[:-1]],
    ]
    program = f"""
from shardprune.cli import main
for words in {asked!r}:
    try:
        main(words)
    except SystemExit as ended:
        print("code", ended.code, flush=True)
"""
    started = [sys.executable, "-c", WITHOUT + program]
    done = subprocess.run(started, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    said = done.stdout.splitlines()
    ends = [(said[place - 1], line) for place, line in enumerate(said) if line.startswith("code ")]
    assert ends[:4] == [
        (f"error: {field}: needs {packages}: pip install 'shardprune[{extra}]'", "code 2")
        for field, packages, extra in (
            ("tasks", "lm_eval, accelerate, peft", "eval"),
            ("merge", "scipy", "experts"),
            ("recover", "deepspeed, tensorboardX", "recover"),
            ("report", "jinja2, plotly", "report"),
        )
    ]
    assert ends[4][1] == "code 0"
    wanted = "no report was written: report: needs jinja2, plotly: pip install 'shardprune[report]'; "
    assert [line for line in said if line.startswith(wanted)]
    assert not (tmp_path / "o").exists()
