"""Real jobs of a real Slurm with three nodes: they end, are cancelled, lose a node, are told that their time is up."""

import json
import re
import secrets
import shutil
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import yaml

from shardprune import Recipe, RecoverRecipe, prune, recover
from shardprune.cluster.slurm.node import LONGEST_TMP
from shardprune.recipes.demo import bundled_model
from shardprune.report.progress import Reporter
from tests.cluster.slurm.sandbox import Sandbox, why_not
from tests.recovery.trainings import make_material, same_zeros
from tests.support.tiny import differing, make_tokens

ROOT = Path(__file__).resolve().parents[3]
WAIT_SECONDS = 240.0
pytestmark = pytest.mark.timeout(900)  # on a busy machine processes take minutes to start
RECIPE = {
    "model": bundled_model(),
    "out": "out",
    "calibration": "tokens.npy",
    "samples": 8,
    "seqlen": 64,
    "wave": 4,
    "sparsity": 0.5,
    "shards": 2,
    "threads": 1,
}
# Of jobs that last until something happens to them.
LONGER = {"calibration": "longer.npy", "samples": 32, "seqlen": 256}
# Ray's own patience with a silent node is half a minute. Workers that start with a node, before there is work, take
# none: each would import all that a worker does for nothing.
QUICK_RAY = {
    "RAY_prestart_worker_first_driver": "0",
    "REPORTER_UPDATE_INTERVAL_MS": "86400000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "3000",
    "RAY_health_check_failure_threshold": "3",
}


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    if lacks := why_not():
        pytest.skip(f"no Slurm to test with: {lacks}")
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))
    folder.chmod(0o755)  # munged will not have its socket where not all users reach it
    sandbox = Sandbox(folder)
    sandbox.up(3, cpus=2, subnet="10.97.31", port=19317, requeue_wait=5, kill_wait=15, node_timeout=10)
    sandbox.environment |= {"PYTHONPATH": str(ROOT), **QUICK_RAY}
    yield sandbox
    sandbox.down()


@pytest.fixture(scope="module")
def tmp() -> Iterator[Path]:
    """Where Ray's files lie on the nodes: the longest path in which its sockets have room."""
    tmp = Path("/tmp", secrets.token_hex(LONGEST_TMP)[: LONGEST_TMP - len("/tmp/")])
    tmp.mkdir()
    yield tmp
    tmp.rmdir()


@pytest.fixture
def folder(tmp_path) -> Path:
    """What jobs are submitted from: a recipe, whose paths are relative to it."""
    make_texts(tmp_path)
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(RECIPE))
    return tmp_path


def make_texts(folder: Path) -> None:
    for one in (RECIPE, LONGER):
        make_tokens(folder / one["calibration"], samples=one["samples"], seqlen=one["seqlen"])


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Callable[..., Path]:
    """The output of the recipe in one process, made while a job that is compared with it runs."""

    def made(**fields: int | str) -> Path:
        folder = tmp_path_factory.mktemp("local")
        make_texts(folder)
        values = {**RECIPE, **fields, "out": str(folder / "out"), "backend": "local"}
        prune(Recipe.checked({**values, "calibration": str(folder / values["calibration"])}), Reporter(quiet=True))
        return folder / "out"

    return made


def until(what: str, true: Callable[[], bool], log: Callable[[], str]) -> None:
    end = time.monotonic() + WAIT_SECONDS
    while not true():
        assert time.monotonic() < end, f"{what} did not happen in {WAIT_SECONDS:g} s:\n{log()}"
        time.sleep(0.5)  # each look is a process


def left_over(sandbox: Sandbox) -> str:
    """Processes that Slurm found after the end of jobs."""
    return sandbox.leftovers.read_text() if sandbox.leftovers.exists() else ""


class Job:
    """A job of the sandbox, submitted from a directory."""

    def __init__(self, sandbox: Sandbox, folder: Path, out: str, *command: str) -> None:
        self._sandbox = sandbox
        self.folder, self.out = folder, folder / out
        said = sandbox.client(*command, cwd=folder).stdout
        self.number = re.search(r"job (\d+)", said)[1]

    def wait(self, what: str, true: Callable[[], bool]) -> None:
        ended = ("COMPLETED", "FAILED", "TIMEOUT")
        until(f"{what} of job {self.number}", lambda: true() or self.state in ended, self.log)
        assert true(), self.log()

    def log(self) -> str:
        return "\n".join(path.read_text() for path in self.folder.glob(f"*-{self.number}.log"))

    def hold(self) -> None:
        """Stop the command's process, which goes on where it is when it is released."""
        (self._command,) = filter(self._is_command, psutil.process_iter())
        self._command.suspend()
        assert not (self.out / "result.json").exists(), "the run was over already"

    def release(self) -> None:
        self._command.resume()

    def _is_command(self, process: psutil.Process) -> bool:
        with suppress(psutil.Error):
            ours = process.environ().get("SLURM_JOB_ID") == self.number
            return ours and process.cmdline()[1:4] == ["-m", "shardprune", "prune"]
        return False

    def layers(self) -> int:
        """How many files of layers there are."""
        with suppress(FileNotFoundError):  # the folder may come and go while a run begins
            return len(list(self.out.glob("model-*.safetensors")))
        return 0

    def nodes(self) -> set[str]:
        return {worker["node"] for worker in json.loads((self.out / "result.json").read_text())["workers"]}

    def __getattr__(self, name: str) -> str:
        """A field of what Slurm says about the job: JobState is `state`, ExitCode `exit_code`, ..."""
        fields = {"state": "JobState", "exit_code": "ExitCode", "restarts": "Restarts", "node_list": "NodeList"}
        said = self._sandbox.client("scontrol", "show", "job", "-o", self.number).stdout
        return dict(word.split("=", 1) for word in said.split() if "=" in word)[fields[name]]


def hold(layers: dict[Job, int]) -> None:
    """Hold each job as soon as it has so many layers; asking Slurm meanwhile would take longer than a layer."""
    end, waiting = time.monotonic() + WAIT_SECONDS, dict(layers)
    while waiting:
        assert time.monotonic() < end, "\n".join(job.log() for job in waiting)
        for job in [job for job, count in waiting.items() if job.layers() >= count]:
            job.hold()
            del waiting[job]
        time.sleep(0.01)


# Take the place of a container's program: they write down what they are told, and run what is to run inside.
STAND_INS = {
    "apptainer": """#!/bin/sh
echo "$SLURM_STEP_ID $*" >>"${0%/*}/seen.log"
while [ "$1" != image.sif ]; do shift; done
shift
exec "$@"
""",
    "srun": f"""#!/bin/sh
for word in "$@"; do
  shift
  case "$word" in
    --container-*) echo "$word" >>"${{0%/*}}/seen.log" ;;
    *) set -- "$@" "$word" ;;
  esac
done
exec {shutil.which("srun")} "$@"
""",
}


def standing_in(sandbox: Sandbox, folder: Path, program: str) -> list[str]:
    """Write a program into the directory `bin`; the words before a command that finds it there, and our Python."""
    (folder / "bin").mkdir()
    (folder / "bin" / program).write_text(STAND_INS[program])
    (folder / "bin" / program).chmod(0o755)
    return ["env", f"PATH={folder / 'bin'}:{Path(sys.executable).parent}:{sandbox.environment['PATH']}"]


def test_a_job_prunes_on_two_nodes_while_another_ends_with_the_code_of_its_command(sandbox, folder, undisturbed):
    script = str(ROOT / "cluster" / "slurm" / "shardprune.sbatch")
    python = f"PATH={Path(sys.executable).parent}:{sandbox.environment['PATH']}"
    asked = ["--nodes=2", "--time=10", script, "prune", "r.yaml", "--threads=2"]  # the CPUs of a node, for one worker
    job = Job(sandbox, folder, "out", "env", python, "sbatch", *asked)
    (folder / "bad.yaml").write_text("model: m\nout: out\nsparsity: 0.5\n")
    words = ["--cpus-per-node", "1", "--object-store", "0.2", "--time", "10", "--script", "bad.sbatch", "--submit"]
    words += ["--container", "apptainer:image.sif", "--sbatch=--hold"]
    command = [
        *standing_in(sandbox, folder, "apptainer"),
        sys.executable,
        "-m",
        "shardprune",
        "slurm",
        "bad.yaml",
        *words,
    ]
    bad = Job(sandbox, folder, "out", *command)
    (folder / "bad.yaml").write_text("model: m\nout: out\nsparsity: 1.5\n")  # which would not have been submitted
    sandbox.client("scontrol", "release", bad.number)
    local = undisturbed(threads=2)
    until("the end of the one that cannot work", lambda: bad.state == "FAILED", bad.log)
    assert bad.exit_code == "2:0"
    assert "error: sparsity: 1.5 is not allowed" in bad.log()
    head, driver = (folder / "bin" / "seen.log").read_text().splitlines()
    inside = f"exec --bind={folder} --bind=/tmp --pwd={folder} image.sif python -m shardprune.cluster.slurm"
    assert head.startswith(f"0 {inside}.node --tmp=/tmp")
    assert driver.startswith(f"1 {inside}.driver prune --recipe {folder / 'bad.yaml'}")
    job.wait("the end", lambda: job.state == "COMPLETED")
    assert job.exit_code == "0:0"
    assert len(job.nodes()) == 2
    assert differing(job.out, local) == []
    assert left_over(sandbox) == ""


def submitted(
    sandbox: Sandbox, folder: Path, out: str, tmp: Path, nodes: int, before: Sequence[str] = (), *further: str
) -> Job:
    """A job that takes one of the two CPUs of each node, for one shard."""
    asked = {"nodes": nodes, "min-nodes": 2, "cpus-per-node": 1, "object-store": 0.2, "time": 10, "notice": 60}
    words = ["--submit", *(f"--{name}={value}" for name, value in asked.items())]
    words += ["--tmp", str(tmp), "--job-name", out, "--script", f"{out}.sbatch", *further]
    longer = [f"--{name}={value}" for name, value in LONGER.items()]
    overrides = ["--", "--out", out, "--shards", str(nodes), *longer]
    command = [*before, sys.executable, "-m", "shardprune", "slurm", "r.yaml", *words, *overrides]
    return Job(sandbox, folder, out, *command)


@pytest.mark.long
def test_jobs_share_nodes_and_outlive_what_goes_wrong(sandbox, folder, tmp, undisturbed):
    """Of two jobs on the same nodes one is cancelled, and leaves nothing behind. The other loses a node and goes on,
    and after Slurm's notice of its time limit again, on the nodes that are left."""
    job = submitted(sandbox, folder, "out", tmp, nodes=3)
    cancelled = submitted(sandbox, folder, "cancelled", tmp, nodes=2)
    hold({job: 1, cancelled: 1})
    finished = {path: path.stat().st_mtime_ns for path in job.out.glob("model-*.safetensors")}
    sandbox.kill_node("node3")
    sandbox.client("scancel", cancelled.number)
    for each in (job, cancelled):
        each.release()
    job.wait("going on", lambda: "going on with what is left" in job.log())
    hold({job: job.layers() + 1})
    assert job.state == "RUNNING", job.log()
    sandbox.client("scancel", "--signal=USR1", "--batch", job.number)
    job.release()
    local = undisturbed(**LONGER)
    job.wait("the end", lambda: job.state == "COMPLETED")
    assert (job.exit_code, job.restarts, job.node_list) == ("0:0", "1", "node[1-2]"), job.log()
    assert job.nodes() == {"node1", "node2"}
    assert "told to stop by SIGUSR1" in job.log()
    assert [path.stat().st_mtime_ns for path in finished] == list(finished.values())
    assert differing(job.out, local) == []
    assert (cancelled.state, cancelled.node_list) == ("CANCELLED", "node[1-2]")
    assert left_over(sandbox) == ""
    (lost,) = tmp.iterdir()  # nobody could clean up there
    assert lost.name == f"sp-{job.number}-{zlib.crc32(b'node3'):08x}"
    shutil.rmtree(lost)


@pytest.mark.long
@pytest.mark.parametrize(("form", "program"), [("apptainer", "apptainer"), ("pyxis", "srun")])
def test_a_job_in_a_container_stops_at_its_notice_and_goes_on(sandbox, folder, tmp, undisturbed, form, program):
    before = standing_in(sandbox, folder, program)
    job = submitted(sandbox, folder, "out", tmp, 2, before, "--container", f"{form}:image.sif", "--mount=/opt:/opt:ro")
    hold({job: 1})
    sandbox.client("scancel", "--signal=USR1", "--batch", job.number)
    until("the signal", lambda: "told to stop by SIGUSR1" in job.log(), job.log)
    job.release()
    local = undisturbed(**LONGER)
    job.wait("the end", lambda: job.state == "COMPLETED")
    assert (job.exit_code, job.restarts) == ("0:0", "1"), job.log()
    assert "stopped by SIGTERM" in job.log()
    assert job.nodes() == {"node1", "node2"}
    assert differing(job.out, local) == []
    seen = (folder / "bin" / "seen.log").read_text()
    assert seen.count("image.sif") == 6  # the head, the other node and the command, twice
    assert seen.count("/opt:/opt:ro") == 6
    assert left_over(sandbox) == ""


TRAINING = {
    "model": "sparse",
    "out": "out",
    "data": "documents.jsonl",
    "length": 16,
    "batch": 8,
    "micro_batch": 2,
    "steps": 160,
    "checkpoint_every": 20,
    "workers": 2,
    "threads": 1,
    "zero": 3,
    "full": True,
    "keep_sparsity": True,
    "offload": True,
}


@pytest.mark.long
def test_a_training_on_two_nodes_outlives_one(sandbox, folder, tmp):
    """Under ZeRO-3, with the optimizer in the nodes' memory. The last of these tests, as the node stays away."""
    make_material(folder)
    (folder / "r.yaml").write_text(yaml.safe_dump(TRAINING))
    asked = {"nodes": 2, "min-nodes": 1, "cpus-per-node": 1, "object-store": 0.2, "time": 10}
    words = ["--submit", *(f"--{name}={value}" for name, value in asked.items()), "--tmp", str(tmp)]
    job = Job(sandbox, folder, "out", sys.executable, "-m", "shardprune", "slurm", "r.yaml", *words)
    checkpoint = job.out / "training" / "latest"
    job.wait("the first checkpoint", checkpoint.exists)
    assert job.node_list == "node[1-2]"
    sandbox.kill_node("node2")
    reached = checkpoint.read_text()
    job.wait("the end", lambda: job.state == "COMPLETED")
    assert "going on with what is left" in job.log()
    result = json.loads((job.out / "result.json").read_text())
    losses = [one["loss"] for one in result["recovery"]["losses"]]
    assert reached != f"step{TRAINING['steps']}"
    assert (result["restarts"], job.nodes()) == (1, {"node1"})
    here = {name: str(folder / TRAINING[name]) for name in ("model", "data")}
    values = {
        **TRAINING,
        **here,
        "out": str(folder / "alone"),
        "workers": 1,
        "zero": 0,
        "offload": False,
        "backend": "local",
    }
    alone = recover(RecoverRecipe.checked(values), Reporter(quiet=True))
    assert losses == pytest.approx([one.loss for one in alone.recovery.losses], abs=1e-4)
    assert same_zeros(folder / "sparse", job.out)
    assert left_over(sandbox) == ""
    for lost in tmp.iterdir():  # nobody could clean up there
        shutil.rmtree(lost)
