"""Scripts of Slurm jobs, and what is wrong before there is one."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from shardprune.cli import main
from shardprune.cluster.slurm import job
from shardprune.cluster.slurm.batch import BatchJob, standing_script
from shardprune.cluster.slurm.processes import ENDURING, SHARING
from shardprune.recipes.commands import COMMANDS

ROOT = Path(__file__).resolve().parents[3]
STANDING = ROOT / "cluster" / "slurm" / "shardprune.sbatch"
RECIPES = sorted((ROOT / "jobs" / "recipes").glob("*.yaml"))
PRUNE = "model: m\nout: o\nsparsity: 0.5\ncalibration: stdlib\n"
PIPELINE = "model: m\nprune: {sparsity: 0.5}\nevaluate: {perplexity: stdlib, shards: 9}\n"


@pytest.fixture
def recipe(tmp_path, monkeypatch) -> Path:
    """A recipe in a directory, whose name no shell leaves alone, that is the current one."""
    folder = tmp_path / "a folder's #1"
    folder.mkdir()
    monkeypatch.chdir(folder)
    path = folder / "r.yaml"
    path.write_text(PRUNE)
    return path


def run(*words: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(["slurm", *words])
    return int(ended.value.code or 0)


def test_the_script_of_the_repository_is_up_to_date():
    assert STANDING.read_text() == standing_script(), f"write standing_script() into {STANDING}"


@pytest.mark.parametrize("name", COMMANDS)
def test_the_script_of_the_repository_runs_any_command(name, tmp_path):
    """The last line is run with a python that prints its arguments."""
    (tmp_path / "python").write_text("#!/bin/sh\nprintf '%s\\n' \"$@\"\n")
    (tmp_path / "python").chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}

    def run_script(*words: str) -> subprocess.CompletedProcess:
        return subprocess.run(["bash", STANDING, *words], env=environment, capture_output=True, text=True)

    done = run_script(name, "a b.yaml", "--out", "it's here")
    words = done.stdout.splitlines()
    assert words[words.index("--") + 1 :] == [*COMMANDS[name].words("a b.yaml"), "--out", "it's here"]
    assert run_script(name).stderr.endswith("RECIPE is missing\n")
    assert run_script().stderr.endswith("COMMAND is missing\n")


def test_a_script_asks_for_what_was_asked(recipe, capsys):
    words = "r.yaml --nodes 4 --min-nodes 2 --gpus-per-node 8 --time 1-12 --account lab --sbatch --constraint=a100"
    options = [*words.split(), "--setup", "source '/opt/env 1/bin/activate'", "--object-store", "1.5"]
    assert run(*options, "--", "--out", "it's here", "--sparsity", "0.6") == 0
    assert "sbatch r.sbatch" in capsys.readouterr().out
    lines = Path("r.sbatch").read_text().splitlines()
    wanted = {
        "--job-name=r",
        f"--chdir={recipe.parent}",
        "--nodes=2-4",
        "--gpus-per-node=8",
        "--exclusive",
        "--mem=0",
        "--time=1-12",
        "--account=lab",
        "--output=%x-%j.log",
        "--open-mode=append",
        "--signal=B:USR1@120",
        "--requeue",
        "--no-kill",
        "--constraint=a100",
    }
    asked = [line.removeprefix("#SBATCH ") for line in lines if line.startswith("#SBATCH ")]
    assert {word for option in asked for word in shlex.split(option)} == wanted
    assert lines[-2] == "source '/opt/env 1/bin/activate'"
    job, command = " ".join(shlex.split(lines[-1])).split(" -- ")
    assert job.startswith("exec python -m shardprune.cluster.slurm.job --min-nodes=2 --notice=120")
    assert "--object-store=1610612736" in job.split()
    assert command == f"prune --recipe {recipe} --out it's here --sparsity 0.6"


@pytest.mark.parametrize(
    ("option", "directive"),
    [
        ("--constraint=a100", "--constraint=a100"),
        ("--constraint a100", "--constraint a100"),
        ("-C a100", "-C a100"),
        ("--exclusive", "--exclusive"),
        ('--comment="two words"', '--comment="two words"'),
        ("--comment=two words", "--comment='two words'"),
        ("--comment two words", "--comment 'two words'"),
        ("--comment=it's", "--comment='it'\"'\"'s'"),
    ],
)
def test_a_value_of_several_words_is_one_for_sbatch(option, directive):
    assert f"#SBATCH {directive}\n" in BatchJob(sbatch=(option,)).script(["prune"], Path("/x"))


def test_a_part_of_each_node_is_shared_with_other_jobs():
    script = BatchJob(cpus_per_node=2, mem="4G").script(["prune"], Path("/x"))
    assert "#SBATCH --cpus-per-task=2\n#SBATCH --mem=4G\n" in script
    assert "--exclusive" not in script


# By the form of a container: its name, what srun is given for it, and what srun runs a module of Python with.
CONTAINERS = {
    "apptainer": (
        "apptainer:/images/shard prune.sif",
        [],
        [
            *("apptainer", "exec", "--nv", "--bind={folder}", "--bind=/tmp", "--bind=/data", "--bind=/a:/b:ro"),
            *("--pwd={folder}", "/images/shard prune.sif"),
        ],
    ),
    "pyxis": (
        "pyxis:ghcr.io#lab/shardprune:0.1.0",
        [
            "--container-image=ghcr.io#lab/shardprune:0.1.0",
            "--container-mounts={folder}:{folder},/tmp:/tmp,/data:/data,/a:/b:ro",
            "--container-workdir={folder}",
        ],
        [],
    ),
}
# Takes the place of srun, writes down its words, and then says what a step says and ends when a step does.
SRUN = """#!/bin/sh
{ printf '%s\\n' "$@"; echo; } >>srun.log
case "$*" in *slurm.driver*) exit 7;; esac
read token
echo '== the banner of an image =='
echo '{"node": "n1", "address": "n1:1", "folder": "/tmp/sp-1"}'
read end
"""
# The same, of a cluster whose head ends as soon as another node is started, which never joins.
LOST = """#!/bin/sh
read token
case "$*" in *--exclude*) touch others; read end; exit;; esac
echo '{"node": "n1", "address": "n1:1", "folder": "/tmp/sp-1"}'
until [ -e others ]; do sleep 0.05; done
exit 1
"""


def run_job(script: str, folder: Path, srun: str, *nodes: str) -> subprocess.CompletedProcess:
    """Run a job's script in a folder, as Slurm would on some nodes, with a program in the place of srun."""
    names = " ".join(nodes)
    for name, program in {"srun": srun, "scontrol": f"#!/bin/sh\nprintf '%s\\n' {names}\n"}.items():
        (folder / name).write_text(program)
        (folder / name).chmod(0o755)
    variables = {"SLURM_JOB_ID": "1", "SLURMD_NODENAME": "n1", "SLURM_JOB_NODELIST": "n", "SLURM_GPUS_ON_NODE": "1"}
    variables |= {"PATH": f"{folder}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        ["bash", "-c", script], env=os.environ | variables, cwd=folder, capture_output=True, text=True, timeout=120
    )


def test_a_head_that_ends_while_others_are_awaited_ends_the_job(tmp_path):
    script = BatchJob(nodes=2, min_nodes=1).script(["prune", "m"], tmp_path)
    done = run_job(script, tmp_path, LOST, "n1", "n2")
    assert done.returncode == 1
    assert "error: Ray's head on n1 ended while the other nodes were awaited" in done.stderr


@pytest.mark.parametrize("form", CONTAINERS)
def test_steps_run_in_the_container_that_a_script_asks_for(form, tmp_path):
    text, of_srun, before = CONTAINERS[form]
    asked = BatchJob.checked({"container": text, "mount": ("/data", "/a:/b:ro"), "gpus_per_node": 1})
    script = asked.script(["prune", "m"], tmp_path)
    assert "#SBATCH --requeue\n" in script
    assert "--no-kill" not in script  # inside, nobody could requeue the job
    done = run_job(script, tmp_path, SRUN, "n1")
    assert done.returncode == 7, done.stderr
    assert "== the banner of an image ==" in done.stderr
    steps = [step.splitlines() for step in (tmp_path / "srun.log").read_text().rstrip("\n").split("\n\n")]
    start = [*SHARING, *ENDURING, "--nodes=1", "--ntasks=1", "--nodelist=n1", *of_srun, *before, "python", "-m"]
    start = [word.replace("{folder}", str(tmp_path)) for word in start]
    assert steps == [
        [*start, "shardprune.cluster.slurm.node", "--tmp=/tmp"],
        [*start, "shardprune.cluster.slurm.driver", "prune", "m"],
    ]


def test_a_job_whose_container_cannot_be_says_so(monkeypatch, capsys):
    for name in job.VARIABLES:
        monkeypatch.setenv(name, "1")
    assert job.main(["--container", "docker://x", "--", "prune", "m"]) == 2
    assert "error: container: 'docker://x' is not allowed; use apptainer:IMAGE or" in capsys.readouterr().err


def test_lists_of_a_recipe_count_where_no_option_replaces_them(recipe, capsys):
    recipe.write_text("perplexity: [wikitext2, ptb]\n")
    assert run("r.yaml", "--", "m") == 0
    recipe.write_text(f"{PRUNE}eval: [nowhere]\n")
    assert run("r.yaml") == 2
    assert capsys.readouterr().err.startswith("error: eval: 'nowhere' is no known source")


def test_a_script_is_printed_or_written_but_not_over_something_else(recipe, capsys):
    assert run("r.yaml", "--script", "-") == 0
    printed = capsys.readouterr().out
    assert [path.name for path in recipe.parent.iterdir()] == ["r.yaml"]
    assert run("r.yaml") == run("r.yaml") == 0
    assert Path("r.sbatch").read_text() == printed
    capsys.readouterr()
    assert run("r.yaml", "--nodes", "2") == 2
    assert capsys.readouterr().err.startswith("error: script: 'r.sbatch' exists and holds something else")
    assert Path("r.sbatch").read_text() == printed


@pytest.mark.parametrize("path", RECIPES, ids=[path.stem for path in RECIPES])
def test_every_recipe_finds_its_command(path, capsys):
    command = next(line for line in path.read_text().splitlines() if line.startswith("# shardprune ")).split()[2]
    model = [] if command == "pipeline" else ["m"]
    assert run(str(path), "--script", "-", "--", *model, "--out", "o") == 0
    assert f"-- {command} " in capsys.readouterr().out.splitlines()[-1]


LINES = "a\n#SBATCH --uid=0"
LONG = "/scratch/of/this/cluster"
WRONG = {
    "unknown field": (
        PRUNE + "sparsty: 0.5\n",
        [],
        "sparsty: no field of a recipe has this name; did you mean spars",
    ),
    "wrong value": (PRUNE, ["--", "--sparsity", "2"], "sparsity: 2.0 is not allowed"),
    "unknown option of the command": (PRUNE, ["--", "--spasity", "0.5"], "prune: No such option: --spasity"),
    "something missing": ("sparsity: 0.5\nout: o\n", [], "model: missing"),
    "fields of every command": ("model: m\nout: o\n", [], "sparsity: missing"),
    "no such command": (PRUNE, ["--command", "prun"], "command: 'prun' is not allowed; use one of prune, rebuild"),
    "another command": (PRUNE, ["--command", "mop"], "sparsity: no field of a recipe has this name"),
    "another cluster": (PRUNE + "address: a:1\n", [], "address: 'a:1' is not the job's own Ray cluster"),
    "no cluster": (PRUNE, ["--", "--backend", "local"], "backend: 'local' would leave the job's nodes alone"),
    "too few GPUs": (PRUNE, ["--gpus-per-node", "2", "--", "--shards", "3"], "shards: 3 workers need as many GPUs"),
    "too few CPUs": (PRUNE, ["--cpus-per-node", "1", "--", "--replicas", "2"], "replicas: 2 workers need as many CPUs"),
    "too few for a step": (PIPELINE, ["--gpus-per-node", "8", "--", "--out", "o"], "evaluate.shards: 9 workers need"),
    "no nodes": (PRUNE, ["--nodes", "0"], "nodes: 0 is not allowed"),
    "fewer than no GPUs": (PRUNE, ["--gpus-per-node", "-1"], "gpus_per_node: -1 is not allowed"),
    "more than all nodes": (PRUNE, ["--min-nodes", "2"], "min_nodes: 2 is more than nodes, 1"),
    "no time": (PRUNE, ["--time", "4h"], "time: '4h' is not allowed; use minutes, minutes:seconds, hours:minutes"),
    "too little time": (PRUNE, ["--time", "3"], "time: '3' leaves no time before the notice, 120 s before the limit"),
    "no room for sockets": (PRUNE, ["--tmp", LONG], f"tmp: '{LONG}' is not allowed; use an absolute path of at most"),
    "mop or experts": (
        "model: m\nout: o\nremove: 0.25\ncalibration: stdlib\n",
        [],
        "command: has to be said: 'r.yaml' is a recipe for mop and for experts",
    ),
    "help": (PRUNE, ["--", "--help"], "prune: '--help' only shows something; give options that override the recipe"),
    "no memory": (PRUNE, ["--mem", "lots of"], "mem: 'lots of' is not allowed; use a number of MB, or one with K, M"),
    "no partition": (PRUNE, ["--partition", ""], "partition: '' is not allowed"),
    "no account": (PRUNE, ["--account", ""], "account: '' is not allowed"),
    "no store": (PRUNE, ["--object-store", "1e-12"], "object_store: 1e-12 is not allowed"),
    "this process's memory": (PRUNE, ["--", "--out", "memory://o"], "out: 'memory://o' lives in this process's memory"),
    "a dash alone": (PRUNE, ["--sbatch", "-"], "sbatch: ['-'] is not allowed; '-' is no option of sbatch"),
    "no option of sbatch": (PRUNE, ["--sbatch", "qos=x"], "sbatch: ['qos=x'] is not allowed; 'qos=x' is no option"),
    "no form of a container": (
        PRUNE,
        ["--container", "docker://x"],
        "container: 'docker://x' is not allowed; use apptainer:IMAGE or pyxis:IMAGE",
    ),
    "no image": (PRUNE, ["--container", "pyxis:"], "container: 'pyxis:' is not allowed; use apptainer:IMAGE or"),
    "two containers": (
        PRUNE,
        ["--container", "apptainer:x.sif", "--sbatch", "--container-image=x"],
        "container: 'apptainer:x.sif' and '--container-image=x' exclude each other; use one of them",
    ),
    "no mount": (
        PRUNE,
        ["--container", "pyxis:x", "--mount", "data"],
        "mount: ['data'] is not allowed; 'data' is no mount; use /DIR, /DIR:/INSIDE or",
    ),
    "two mounts in one": (PRUNE, ["--container", "pyxis:x", "--mount", "/a,/b"], "mount: ['/a,/b'] is not allowed"),
    "a mount of no container": (PRUNE, ["--mount", "/data"], "mount: ('/data',) has no effect without container"),
    "no directory of a container": (
        PRUNE,
        ["--container", "pyxis:x", "--tmp", "/a:b"],
        "tmp: '/a:b' holds ':'; a directory that a container sees has none",
    ),
    "printed and submitted": (PRUNE, ["--script", "-", "--submit"], "script: '-' is printed, not submitted"),
    "two lines": (PRUNE, ["--job-name", LINES], f"job_name: {LINES!r} holds '\\n'; use text of one line"),
    "two lines to run first": (PRUNE, ["--setup", "a\rb"], "setup: 'a\\rb' holds '\\r'; use text of one line"),
    "half a character": (PRUNE, ["--account", "a\udc80"], "account: 'a\\udc80' holds a character that is in no text"),
    "two lines of the command": (
        PRUNE,
        ["--", "--calibration", f"{LINES}.txt"],
        "overrides: 'a\\n#SBATCH --uid=0.txt'",
    ),
}


@pytest.mark.parametrize(("text", "words", "said"), WRONG.values(), ids=WRONG)
def test_bad_input_is_one_line_and_no_script(recipe, capsys, text, words, said):
    recipe.write_text(text)
    assert run("r.yaml", *words) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(f"error: {said}")
    assert captured.err.count("\n") == 1
    assert [path.name for path in recipe.parent.iterdir()] == ["r.yaml"]


def test_a_working_directory_of_two_lines(recipe, capsys, monkeypatch):
    folder = recipe.parent / LINES
    folder.mkdir(parents=True)
    monkeypatch.chdir(folder)
    assert run(str(recipe)) == 2
    assert capsys.readouterr().err.startswith("error: working directory: ")
    assert list(folder.iterdir()) == []


def test_a_machine_without_slurm(recipe, capsys, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    assert run("r.yaml", "--submit") == 2
    assert capsys.readouterr().err == "error: submit: sbatch is not installed here; 'r.sbatch' is written\n"


ALONE = """
import sys
from importlib.machinery import PathFinder

find = PathFinder.find_spec
there = {"pydantic", "pydantic_core", "annotated_types", "typing_extensions", "typing_inspection"}

def find_spec(name, *more):
    spec = find(name, *more)
    installed = spec and "site-packages" in (spec.origin or "site-packages")
    return None if installed and name.partition(".")[0] not in there else spec

PathFinder.find_spec = staticmethod(find_spec)
from shardprune.cluster.slurm import job
print(job.main(["--", "prune", "m"]))
"""


def test_the_process_of_a_job_needs_pydantic_alone():
    """It runs outside of the container, where little else may be installed."""
    environment = {name: value for name, value in os.environ.items() if name not in job.VARIABLES}
    done = subprocess.run([sys.executable, "-c", ALONE], env=environment, capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == "2\n", done.stderr


def test_the_process_of_a_job_outside_of_slurm_says_so(monkeypatch, capsys):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    assert job.main(["--", "prune", "m"]) == 2
    assert "error: SLURM_JOB_ID is not set" in capsys.readouterr().err
