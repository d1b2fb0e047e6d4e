"""The configurations of Ray, each against what will read it."""

import copy
import os
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import click
import jsonschema
import pytest
import yaml

os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")

from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.runtime_env import RuntimeEnv
from ray.runtime_env.runtime_env import RuntimeEnvConfig
from ray.scripts.scripts import start

import shardprune
from tests.docs.pages import Page

REPOSITORY = Path(__file__).resolve().parents[1]
FOLDER = REPOSITORY / "ray_configs"
CLUSTERS = ("aws", "gcp")
GPUS, NODES = 8, 2  # of a node, and nodes


def read(name: str) -> Any:
    return yaml.safe_load((FOLDER / f"{name}.yaml").read_text())


def loaded(config: dict[str, Any]) -> dict[str, Any]:
    """An autoscaler's configuration as `ray up` sees it, or what Ray has against it."""
    prepared = prepare_config(copy.deepcopy(config))
    validate_config(prepared)
    return prepared


def derived(job: dict[str, Any]) -> dict[str, Any]:
    """What Ray's autoscaler makes of the cluster of a RayJob."""
    cluster = {"metadata": {"name": "c", "namespace": "n"}, "spec": job["spec"]["rayClusterSpec"]}
    return _derive_autoscaling_config_from_ray_cr(cluster)


# -- the runtime environment ---------------------------------------------------------------------------------------


def test_ray_accepts_the_runtime_environment_and_knows_all_its_fields():
    environment = read("runtime_env")
    checked = RuntimeEnv(**environment)
    assert checked["env_vars"] == environment["env_vars"]
    assert set(environment) - {"excludes"} <= RuntimeEnv.known_fields
    assert set(environment["config"]) <= RuntimeEnvConfig.known_fields


def test_what_a_job_needs_is_not_excluded():
    folders = {line.strip("/") for line in read("runtime_env")["excludes"]}
    assert folders == {"docs", "tests"}
    assert all((REPOSITORY / folder).is_dir() for folder in folders)


# -- clusters by the autoscaler ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("cloud", CLUSTERS)
def test_ray_loads_a_cluster_with_a_head_without_gpus(cloud):
    config = loaded(read(cloud))
    head, gpus = config["available_node_types"][config["head_node_type"]], config["available_node_types"]["gpus"]
    assert head["resources"] == {"CPU": 0}
    assert gpus["resources"]["GPU"] == GPUS
    assert gpus["min_workers"] == gpus["max_workers"] == config["max_workers"] == NODES


WRONG = {
    "an unknown field": lambda config: config.update(worker_count=2),
    "an unknown field of docker": lambda config: config["docker"].update(gpu_image="x"),
    "a node without a configuration": lambda config: config["available_node_types"]["gpus"].pop("node_config"),
    "a fraction of a GPU": lambda config: config["available_node_types"]["gpus"]["resources"].update(GPU=0.5),
    "more nodes than allowed": lambda config: config.update(max_workers=1),
}


@pytest.mark.parametrize("change", WRONG)
def test_ray_would_refuse_a_wrong_cluster(change):
    config = read("aws")
    WRONG[change](config)
    with pytest.raises((jsonschema.ValidationError, ValueError)):
        loaded(config)


def test_ec2_would_start_the_nodes():
    """EC2's own description of what an instance is started with, which also knows the types of all values."""
    session = pytest.importorskip("botocore.session", reason="needs botocore, which comes with s3fs")
    from botocore.validate import ParamValidator

    shape = session.get_session().get_service_model("ec2").operation_model("RunInstances").input_shape
    for node in read("aws")["available_node_types"].values():
        wanted = {**node["node_config"], "MinCount": 1, "MaxCount": 1}
        assert ParamValidator().validate(wanted, shape).generate_report() == ""


def test_aws_nodes_have_profiles_of_the_users_own():
    """Ray would make one for a head that has none, which may not pass the nodes' role on to them."""
    nodes = {name: node["node_config"] for name, node in read("aws")["available_node_types"].items()}
    profiles = {name: node["IamInstanceProfile"]["Arn"] for name, node in nodes.items()}
    assert profiles["head"] != profiles["gpus"], "GPU nodes need not start nodes"
    header = (FOLDER / "aws.yaml").read_text().split("\n\n")[0]
    for arn in profiles.values():
        assert arn.split("/")[1] in header


def test_gcp_nodes_end_with_their_disks_and_do_not_move_with_gpus():
    nodes = {name: node["node_config"] for name, node in read("gcp")["available_node_types"].items()}
    assert all(disk["autoDelete"] for node in nodes.values() for disk in node["disks"])
    assert nodes["gpus"]["scheduling"]["onHostMaintenance"] == "TERMINATE"
    assert all(node["machineType"] for node in nodes.values())


@pytest.mark.parametrize("name", [*CLUSTERS, "on-premise"])
def test_commands_of_nodes_are_commands(name):
    config = loaded(read(name))
    started = []
    for name, commands in config.items():
        for command in commands if name.endswith("commands") else []:
            subprocess.run(["bash", "-n", "-c", command], check=True)
            started += re.findall(r"ray start (.*)", command)
    assert len(started) == 2
    for options in started:
        start.make_context("start", shlex.split(options))  # raises where one is unknown


@pytest.mark.parametrize("name", [*CLUSTERS, "on-premise"])
def test_nodes_install_what_was_copied_or_the_same_version(name, tmp_path):
    """The commands run with a pip that prints its last word."""
    (command,) = (command for command in loaded(read(name))["setup_commands"] if "pyproject.toml" in command)
    for folder in ("shardprune", "bin", "shardprune-env/bin"):
        (tmp_path / folder).mkdir(parents=True)
    for pip in (tmp_path / "bin" / "pip", tmp_path / "shardprune-env" / "bin" / "pip"):
        pip.write_text('#!/bin/sh\necho "$PWD $*"\n')
        pip.chmod(0o755)
    environment = {"HOME": str(tmp_path), "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
    extras = "eval,experts,recover,report"
    for given in (f"shardprune[{extras}]=={shardprune.__version__}", f".[{extras}]"):
        done = subprocess.run(["bash", "-c", command], env=environment, capture_output=True, text=True, check=True)
        assert done.stdout == f"{tmp_path}/shardprune install --constraint constraints.txt {given}\n"
        (tmp_path / "shardprune" / "pyproject.toml").touch()


def test_ec2_and_ray_would_take_the_interfaces_that_the_page_shows():
    pytest.importorskip("boto3", reason="needs boto3")
    import botocore.session
    from botocore.validate import ParamValidator
    from ray.autoscaler._private.aws.config import _configure_from_network_interfaces

    (text,) = (block.text for block in Page.read(REPOSITORY / "docs/clusters.md").blocks if "Interfaces:" in block.text)
    config = read("aws")
    node = config["available_node_types"]["gpus"]["node_config"]
    node.update(yaml.safe_load(text))
    taken = _configure_from_network_interfaces(loaded(config))["available_node_types"]["gpus"]["node_config"]
    assert taken["SubnetIds"] == ["YOUR-SUBNET"] * len(node["NetworkInterfaces"])
    shape = botocore.session.get_session().get_service_model("ec2").operation_model("RunInstances").input_shape
    assert ParamValidator().validate({**node, "MinCount": 1, "MaxCount": 1}, shape).generate_report() == ""


# -- machines over ssh -------------------------------------------------------------------------------------------------


def on_premise(change=lambda config: None):
    """The cluster of machines over ssh as `ray up` sees it after a change."""
    config = read("on-premise")
    change(config)
    return loaded(config)


def test_ray_takes_every_machine_named_for_a_node_and_no_more():
    (node,) = on_premise()["available_node_types"].values()
    assert (node["min_workers"], node["max_workers"]) == (NODES - 1, NODES - 1)
    machines = [f"10.0.0.{number}" for number in range(5)]
    (node,) = on_premise(lambda config: config["provider"].update(worker_ips=machines))["available_node_types"].values()
    assert (node["min_workers"], node["max_workers"]) == (5, 5)


@pytest.mark.parametrize(
    "change",
    [
        lambda config: config["provider"].pop("head_ip"),
        lambda config: config["provider"].update(worker_ips="WORKER"),
        lambda config: config.update(available_node_types={"gpus": {}}),
        lambda config: config.update(setup_command=["true"]),
    ],
    ids=["no head", "no list of machines", "types of nodes", "an unknown field"],
)
def test_ray_would_refuse_wrong_machines(change, capsys):
    with pytest.raises((jsonschema.ValidationError, ValueError, click.ClickException)):
        on_premise(change)


def test_path_is_extended_once_whatever_stood_there(tmp_path):
    (command,) = (command for command in read("on-premise")["setup_commands"] if ".bashrc" in command)
    environment = {"HOME": str(tmp_path), "PATH": os.environ["PATH"]}
    for before in (None, "alias l=ls\n"):
        if before:
            (tmp_path / ".bashrc").write_text(before)
        for _ in range(2):
            subprocess.run(["bash", "-c", command], check=True, env=environment)
            line = 'export PATH="$HOME/shardprune-env/bin:$PATH"\n'
            assert (tmp_path / ".bashrc").read_text() == line + (before or "")


# -- a job on Kubernetes ---------------------------------------------------------------------------------------------


def test_ray_derives_the_nodes_of_the_kubernetes_job():
    types = derived(read("kuberay-rayjob"))["available_node_types"]
    assert types["headgroup"]["resources"]["CPU"] == 0
    assert types["gpus"]["resources"]["GPU"] == GPUS
    assert types["gpus"]["min_workers"] == types["gpus"]["max_workers"] == NODES


def test_ray_would_refuse_a_cluster_of_kubernetes_without_cpus():
    job = read("kuberay-rayjob")
    for group in job["spec"]["rayClusterSpec"]["workerGroupSpecs"]:
        del group["template"]["spec"]["containers"][0]["resources"]
    with pytest.raises(ValueError, match="CPU"):
        derived(job)


def kept(template: dict[str, Any]) -> dict[str, Any]:
    """What Kubernetes' own models keep of a pod: fields that they know."""
    client = pytest.importorskip("kubernetes.client", reason="needs the kubernetes package")
    return client.ApiClient().sanitize_for_serialization(client.V1PodTemplateSpec.from_dict(template))


def test_pods_have_no_field_that_kubernetes_does_not_know():
    cluster = read("kuberay-rayjob")["spec"]["rayClusterSpec"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        assert kept(group["template"]) == group["template"]
        group["template"]["spec"]["containers"][0]["imagePull"] = "Always"
        assert kept(group["template"]) != group["template"]


def test_the_kubernetes_job_has_the_runtime_environment_of_submitted_jobs():
    given, ours = yaml.safe_load(read("kuberay-rayjob")["spec"]["runtimeEnvYAML"]), read("runtime_env")
    assert RuntimeEnv(**given)["working_dir"].startswith("local:///")
    assert (given["env_vars"], given["config"]) == (ours["env_vars"], ours["config"])


# -- what all say ---------------------------------------------------------------------------------------------------


def test_headers_say_what_is_needed_and_what_it_costs():
    for name in (*CLUSTERS, "on-premise", "kuberay-rayjob"):
        header = (FOLDER / f"{name}.yaml").read_text().split("\n\n")[0]
        assert "# Needs:" in header
        assert f"{GPUS * NODES} GPU" in header.split("# Costs:")[1]


def test_every_job_that_is_shown_exists():
    for file in FOLDER.glob("*.yaml"):
        for module, recipe in re.findall(r"-m (jobs\.\w+)(?: (?:-m )?(jobs/\S+\.yaml))?", file.read_text()):
            assert (REPOSITORY / f"{module.replace('.', '/')}.py").is_file(), (file.name, module)
            assert not recipe or (REPOSITORY / recipe).is_file(), (file.name, recipe)


def test_the_version_of_ray_is_the_one_that_is_tested():
    import ray

    for name in (*CLUSTERS, "on-premise", "kuberay-rayjob"):
        text = (FOLDER / f"{name}.yaml").read_text()
        assert set(re.findall(r"ray:(\d+\.\d+\.\d+)|ray\[default\]==([\d.]+)", text)) <= {
            (ray.__version__, ""),
            ("", ray.__version__),
        }
        assert ray.__version__ in text
