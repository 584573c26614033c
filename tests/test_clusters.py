"""The recipes for clusters hold together, and processes started as examples/jobset.yaml says meet."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.children import environment
from tests.together import finish_both, free_port
from tests.train.processes import write_inputs

ROOT = Path(__file__).parent.parent
SLURM = ROOT / "examples" / "slurm.sh"


@pytest.fixture(scope="module")
def manifest():
    return yaml.safe_load((ROOT / "examples" / "jobset.yaml").read_text())


@pytest.fixture(scope="module")
def job(manifest):
    (replicated,) = manifest["spec"]["replicatedJobs"]
    return replicated["template"]["spec"]


def container_of(job):
    (container,) = job["template"]["spec"]["containers"]
    return container


def flag(container, name):
    """The value of ``--name=VALUE``."""
    (value,) = [text.partition("=")[2] for text in container["args"] if text.startswith(f"--{name}=")]
    return value


def test_the_coordinator_is_the_pod_with_index_0_and_all_pods_are_awaited(manifest, job):
    name, replicated = manifest["metadata"]["name"], manifest["spec"]["replicatedJobs"][0]
    container = container_of(job)
    host, _, port = flag(container, "coordinator").partition(":")
    assert host == f"{name}-{replicated['name']}-0-0.{name}"
    assert container["ports"] == [{"containerPort": int(port)}]
    assert replicated["replicas"] == 1
    assert job["completionMode"] == "Indexed"
    assert str(job["completions"]) == str(job["parallelism"]) == flag(container, "num_processes")


def test_bad_input_alone_is_not_started_again(manifest, job):
    (rule,) = job["podFailurePolicy"]["rules"]
    assert rule["onExitCodes"] == {"containerName": container_of(job)["name"], "operator": "In", "values": [2]}
    (failure,) = manifest["spec"]["failurePolicy"]["rules"]
    assert (failure["action"], failure["onJobFailureReasons"]) == ("FailJobSet", ["PodFailurePolicy"])
    assert job["backoffLimit"] == 0
    assert job["template"]["spec"]["restartPolicy"] == "Never"  # as podFailurePolicy demands


def test_what_must_outlive_a_pod_is_on_the_shared_volume(job):
    container = container_of(job)
    (shared,) = [mount["mountPath"] for mount in container["volumeMounts"] if mount["name"] == "shared"]
    kept = {variable["name"]: variable["value"] for variable in container["env"]}
    for path in (flag(container, "config"), flag(container, "run_dir"), kept["XDG_CACHE_HOME"]):
        assert path.startswith(f"{shared}/")


def start_pod(job, folder, index, port):
    """The container's command and environment as kubelet gives them to pod ``index``, here and briefly."""
    container = container_of(job)
    host = flag(container, "coordinator").partition(":")[0]
    places = {"$(JOB_COMPLETION_INDEX)": str(index), f"{host}:8476": f"127.0.0.1:{port}", "/shared": str(folder)}
    args = [*container["args"], "--train.steps=2"]
    variables = {variable["name"]: variable["value"] for variable in container["env"]}
    for there, here in places.items():
        args = [text.replace(there, here) for text in args]
        variables = {name: value.replace(there, here) for name, value in variables.items()}
    python, *module = container["command"]
    assert python == "python"
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    kubernetes = {"KUBERNETES_SERVICE_HOST": "127.0.0.1", "JOB_COMPLETION_INDEX": str(index)}
    return subprocess.Popen(
        [sys.executable, *module, *args],
        cwd=folder,
        env=environment() | kubernetes | variables | {"PYTHONPATH": paths},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
def test_two_pods_meet_and_train_one_run(job, tmp_path):
    write_inputs(tmp_path)
    (tmp_path / "tiny.yaml").rename(tmp_path / "config.yaml")
    port = free_port()
    (out, err), (silent, its_error) = finish_both([start_pod(job, tmp_path, index, port) for index in range(2)])
    run = tmp_path / "runs" / "first"
    assert "bits per byte" in out
    assert silent == err == its_error == ""
    assert [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()] == [1, 2]
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["2"]


def test_the_batch_script_is_bash():
    done = subprocess.run(["bash", "-n", SLURM], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(("code", "restarts", "again"), [
    (0, 0, False), (1, 0, False), (2, 0, False), (3, 0, True), (137, 0, True), (143, 0, True), (143, 50, False),
])  # fmt: skip
def test_the_batch_script_requeues_lost_and_preempted_jobs_and_no_others(tmp_path, code, restarts, again):
    """Stand-ins for srun and scontrol note their arguments: what the script does with srun's exit code is its own."""
    for name, body in (("srun", f"exit {code}"), ("scontrol", "[ $1 = show ] && echo node7 && echo node8")):
        (tmp_path / name).write_text(f'#!/bin/bash\necho {name} "$COORDINATOR" "$*" >> {tmp_path}/said\n{body}\n')
        (tmp_path / name).chmod(0o755)
    job = {"SLURM_JOB_ID": "4097", "SLURM_JOB_NODELIST": "node[7-8]", "SLURM_RESTART_COUNT": str(restarts)}
    job |= {"PATH": f"{tmp_path}:{os.environ['PATH']}", "HOME": str(tmp_path)}
    done = subprocess.run(["bash", SLURM, "--config", "a b.yaml"], env=job, capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    said = (tmp_path / "said").read_text()
    assert ("scontrol node7:61441 requeue 4097" in said) == again
    assert "task --config a b.yaml" in said
