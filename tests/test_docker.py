"""The Dockerfile: pinned, without root, and of files that are there and reach the build."""

import fnmatch
import re
import shlex
from pathlib import Path

import pytest
import yaml

import shardprune
from tests.test_ray_configs import FOLDER, read

REPOSITORY = Path(__file__).resolve().parents[1]
IGNORED = (REPOSITORY / ".dockerignore").read_text().splitlines()


@pytest.fixture(scope="module")
def instructions() -> list[tuple[str, str]]:
    """Instructions with their arguments in one line, as Docker reads them."""
    text = re.sub(r"^#.*\n", "", (REPOSITORY / "cluster/docker/Dockerfile").read_text(), flags=re.MULTILINE)
    lines = re.sub(r"\\\n\s*", "", text).splitlines()
    return [tuple(line.split(" ", 1)) for line in lines if line]


def of(instructions, name):
    return [argument for instruction, argument in instructions if instruction == name]


def reaches(name: str) -> bool:
    """Whether .dockerignore lets a file through: the last pattern that fits says so."""
    found = True
    for pattern in IGNORED:
        if pattern and not pattern.startswith("#"):
            kept, words = pattern.startswith("!"), pattern.removeprefix("!")
            places = [name, *map(str, Path(name).parents)]
            if any(fnmatch.fnmatchcase(place, words.removeprefix("**/")) for place in places) or (
                words.startswith("**/") and words.removeprefix("**/") in Path(name).parts
            ):
                found = kept
    return found


def test_the_base_is_pinned_and_the_process_is_not_roots(instructions):
    (base,) = of(instructions, "FROM")
    assert re.fullmatch(r"python:3\.1[1-3]\.\d+-slim-\w+", base)
    (uid,) = re.findall(r"useradd .*--uid (\d+) shardprune", " ".join(of(instructions, "RUN")))
    assert of(instructions, "USER") == [uid], "of a name Kubernetes cannot tell that it is not root's"
    names = [name for name, _ in instructions]
    assert "RUN" not in names[names.index("USER") :]


def test_every_installation_is_constrained(instructions):
    installed = [command for run in of(instructions, "RUN") for command in run.split("&&") if "pip install" in command]
    assert len(installed) == 3
    assert all("--constraint constraints.txt" in command for command in installed)


def test_what_is_copied_is_there_and_nothing_else_reaches_the_build(instructions):
    copied = [word for argument in of(instructions, "COPY") for word in argument.split()[:-1]]
    assert all((REPOSITORY / name).exists() and reaches(name) for name in copied)
    package = [path.relative_to(REPOSITORY).as_posix() for path in (REPOSITORY / "shardprune").rglob("*.*")]
    assert len(package) > 100
    assert all(reaches(name) == ("__pycache__" not in name) for name in package)
    assert not any(
        reaches(name) for name in (".git/config", "tests/test_docker.py", "runs/x", "docs/serving.md", ".env")
    )


def test_the_kubernetes_job_runs_in_the_images_copy_of_the_repository(instructions):
    spec = read("kuberay-rayjob")["spec"]
    place, copies = "", {}
    for name, argument in instructions:
        if name == "WORKDIR":
            place = argument
        if name == "COPY":
            *sources, to = argument.split()
            copies.update(dict.fromkeys(sources, f"{place}/{'' if to == './' else to}"))
    folder = yaml.safe_load(spec["runtimeEnvYAML"])["working_dir"].removeprefix("local://")
    python, option, module, recipe, *_ = shlex.split(spec["entrypoint"])
    assert (python, option) == ("python", "-m")
    for needed in (f"{module.replace('.', '/')}.py", recipe):
        assert (REPOSITORY / needed).is_file()
        assert copies[needed.split("/")[0]] == f"{folder}/{needed.split('/')[0]}"


def test_the_kubernetes_job_shows_the_build_of_its_image():
    text = (FOLDER / "kuberay-rayjob.yaml").read_text()
    (file, tag) = re.findall(r"docker build --file (\S+) --tag (\S+) \.", text)[0]
    assert (REPOSITORY / file).is_file()
    cluster = read("kuberay-rayjob")["spec"]["rayClusterSpec"]
    templates = [group["template"] for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])]
    assert {container["image"] for each in templates for container in each["spec"]["containers"]} == {tag}


def test_tags_of_our_image_are_the_version():
    texts = [path.read_text() for path in (*FOLDER.glob("*.yaml"), *REPOSITORY.glob("cluster/**/*")) if path.is_file()]
    tags = {tag for text in texts for tag in re.findall(r"shardprune:([\w.]+)", text)}
    assert tags == {shardprune.__version__}


def test_an_installation_leaves_nothing_but_the_repository(instructions):
    """pip builds in the folder of the sources."""
    installed = [run.split("&&") for run in of(instructions, "RUN") if re.search(r"pip install .*\s'?\.", run)]
    assert len(installed) == 2
    for commands in installed:
        assert "rm -r build *.egg-info" in (command.strip() for command in commands)


def test_gpus_are_seen_by_those_who_ask_for_them(instructions):
    """Without these variables Enroot shows none; with them Kubernetes may show all to a pod that asks for none."""
    settings = dict(word.split("=") for argument in of(instructions, "ENV") for word in argument.split())
    assert settings["NVIDIA_VISIBLE_DEVICES"] == "all"
    assert {"compute", "utility"} <= set(settings["NVIDIA_DRIVER_CAPABILITIES"].split(","))
    cluster = read("kuberay-rayjob")["spec"]["rayClusterSpec"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        (container,) = group["template"]["spec"]["containers"]
        hidden = {"name": "NVIDIA_VISIBLE_DEVICES", "value": "void"} in container.get("env", [])
        assert hidden == ("nvidia.com/gpu" not in container["resources"]["limits"])


def test_arguments_of_a_build_that_are_shown_come_before_what_uses_them(instructions):
    text = (REPOSITORY / "cluster/docker/Dockerfile").read_text() + (REPOSITORY / "docs/clusters.md").read_text()
    shown = set(re.findall(r"--build-arg (\w+)=", text))
    assert shown == set(of(instructions, "ARG")) == {"PIP_EXTRA_INDEX_URL"}
    first = next(at for at, (name, words) in enumerate(instructions) if name == "RUN" and "pip install" in words)
    assert all(at < first for at, (name, _) in enumerate(instructions) if name == "ARG")
