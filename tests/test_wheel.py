"""The wheel, installed in an environment of its own, away from the repository."""

import filecmp
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Callable
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
SOURCES = ("pyproject.toml", "README.md", "LICENSE", "constraints.txt", "shardprune", "jobs", "ray_configs", "cluster")
SUPPLIED = (
    "constraints.txt",
    "cluster/slurm/*",
    "jobs/*.py",
    "jobs/recipes/*",
    "ray_configs/*",
    "ray_configs/models/*/*",
)
Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="module")
def environment(tmp_path_factory) -> Path:
    """An environment with the wheel, which sees the packages of this one but none of the repository's modules."""
    folder = tmp_path_factory.mktemp("wheel")
    (folder / "source").mkdir()
    for name in SOURCES:
        copy = shutil.copytree if (REPOSITORY / name).is_dir() else shutil.copy
        copy(REPOSITORY / name, folder / "source" / name)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    build = ["wheel", "--no-deps", "--no-index", "--no-build-isolation", f"--wheel-dir={folder}", folder / "source"]
    subprocess.run([*pip, *build], check=True)
    (wheel,) = folder.glob("*.whl")
    venv.create(folder / "env", with_pip=False)
    (packages,) = folder.glob("env/lib/python*/site-packages")
    (packages / "packages.pth").write_text(sysconfig.get_path("purelib") + "\n")
    subprocess.run(
        [*pip, f"--python={folder / 'env' / 'bin' / 'python'}", "install", "--no-deps", "--no-index", wheel], check=True
    )
    return folder / "env"


@pytest.fixture
def run(environment: Path, tmp_path: Path) -> Run:
    """Run a command of the environment in a directory under tmp_path."""
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    variables["PATH"] = f"{environment / 'bin'}{os.pathsep}{variables['PATH']}"

    def run(*words: object, place: str = ".", check: bool = True) -> "subprocess.CompletedProcess[str]":
        command = [str(word) for word in words]
        return subprocess.run(command, cwd=tmp_path / place, env=variables, capture_output=True, text=True, check=check)

    return run


@pytest.fixture
def place(run: Run) -> Path:
    """What `shardprune --files` names."""
    return Path(run("shardprune", "--files").stdout.rstrip("\n"))


def test_an_installation_has_the_files_of_the_repository(environment: Path, place: Path):
    assert place == environment / "share" / "shardprune"
    there = {path.relative_to(place).as_posix() for path in place.rglob("*") if path.is_file()}
    there = {name for name in there if "__pycache__" not in name}
    wanted = {path.relative_to(REPOSITORY).as_posix() for pattern in SUPPLIED for path in REPOSITORY.glob(pattern)}
    assert there == {name for name in wanted if (REPOSITORY / name).is_file()}
    assert {"jobs/prune.py", "jobs/recipes/owl-sparsegpt-70.yaml", "ray_configs/aws.yaml"} <= there
    assert filecmp.cmpfiles(place, REPOSITORY, there, shallow=False)[1:] == ([], [])


def test_jobs_and_scripts_run_in_a_copy_of_the_files(run: Run, place: Path, environment: Path):
    run("cp", "-r", place, "files")
    look = "import jobs, shardprune; print(jobs.__file__, shardprune.__file__)"
    ours, package = run("python", "-c", look, place="files").stdout.split()
    assert ours.endswith("/files/jobs/__init__.py")
    assert Path(package).is_relative_to(environment)
    done = run("python", "-m", "jobs.prune", "jobs/recipes/owl-sparsegpt-70.yaml", place="files", check=False)
    assert (done.returncode, done.stderr) == (
        2,
        "error: out: missing; give --out, or out in a recipe; see shardprune prune --help\n",
    )
    script = run(
        "shardprune", "slurm", "jobs/recipes/mosaic-70.yaml", "--script", "-", "--", "--out", "o", place="files"
    )
    assert f"exec {environment / 'bin' / 'python'} -m shardprune.cluster.slurm.job" in script.stdout


def test_a_package_without_its_files_says_so(run: Run, environment: Path, tmp_path: Path):
    """As when its folder alone is copied; the environment's own files are elsewhere meanwhile."""
    (package,) = environment.glob("lib/python*/site-packages/shardprune")
    files = environment / "share" / "shardprune"
    files.rename(tmp_path / "elsewhere")
    try:
        done = run("shardprune", "--files", check=False)
    finally:
        (tmp_path / "elsewhere").rename(files)
    said = f"error: files: none lie beside '{package}'; pip install shardprune brings them\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", said)


@pytest.mark.long
def test_a_recipe_of_the_files_prunes(run: Run, place: Path, folder: Path, tmp_path: Path):
    run("cp", "-r", place, "files")
    tokens = folder / "tokens.npy"
    options = {"out": tmp_path / "o", "calibration": tokens, "eval": tokens, "samples": 4, "seqlen": 24, "threads": 1}
    words = [word for name, value in options.items() for word in (f"--{name}", value)]
    recipe = "jobs/recipes/owl-sparsegpt-70.yaml"
    run("python", "-m", "jobs.prune", recipe, folder / "model", "--backend", "local", *words, place="files")
    checked = run("shardprune", "check", tmp_path / "o")
    assert checked.returncode == 0
