"""The launchers that need a cluster: what their files say is run here, as far as one machine goes."""

import importlib
import json
import os
import shlex
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.limits import PROGRAM_LIMIT_S
from tests.support.selection import quick, torch_only

pytestmark = torch_only

LAUNCH = Path(__file__).resolve().parents[2] / "launch"
PODS = {
    "pytorchjob.yaml": [{"HOSTNAME": f"distckpt-digits-worker-{index}"} for index in range(2)],
    "jobset.yaml": [{"JOB_COMPLETION_INDEX": str(index)} for index in range(2)],
}
"""For each manifest what its pods find in their environment."""


def pod_of(manifest: str) -> tuple[dict[str, Any], int]:
    """Return the pod's specification and the number of pods."""
    (document,) = importlib.import_module("yaml").safe_load_all((LAUNCH / "k8s" / manifest).read_text(encoding="utf-8"))
    spec = document["spec"]
    if document["kind"] == "PyTorchJob":
        assert document["apiVersion"] == "kubeflow.org/v1"
        worker = spec["pytorchReplicaSpecs"]["Worker"]
        return worker["template"]["spec"], worker["replicas"]
    assert (document["apiVersion"], document["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    (jobs,) = spec["replicatedJobs"]
    job = jobs["template"]["spec"]
    assert job["parallelism"] == job["completions"]
    return job["template"]["spec"], job["parallelism"]


@quick(1)
@pytest.mark.parametrize("manifest", PODS)
def test_a_manifest_starts_one_job_on_all_its_pods(manifest: str, tmp_path: Path) -> None:
    pod, num_pods = pod_of(manifest)
    assert num_pods == len(PODS[manifest])
    (container,) = pod["containers"]
    (text,) = container["args"]
    assert container["command"] == ["sh", "-c"]
    assert f"NNODES={num_pods} " in text
    assert pod["terminationGracePeriodSeconds"] > 30, "torchrun's own, and what a checkpoint takes"
    (volume,) = pod["volumes"]
    assert [mount["name"] for mount in container["volumeMounts"]] == [volume["name"]]

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # What a cluster gives: names that resolve, a network between the pods, a shared volume.
    words = ["127.0.0.1" if "MASTER_ADDR" in word or "LOCAL_ADDR" in word else "" for word in shlex.split(text)]
    for word, address in zip(text.split(), words, strict=True):
        if address:
            text = text.replace(word, f"{word.partition('=')[0]}={address}")
    text = text.replace(container["volumeMounts"][0]["mountPath"], str(tmp_path))
    text += f" --epochs 1 --summary {tmp_path}/summary.json"
    base = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "PYTEST_"))}
    base |= {"PYTHON": sys.executable, "MASTER_PORT": str(port), "IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    pods = [
        subprocess.Popen(
            [*container["command"], text],
            cwd=LAUNCH.parent,
            env=base | own,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for own in PODS[manifest]
    ]
    try:
        for process in pods:
            output, _ = process.communicate(timeout=PROGRAM_LIMIT_S)
            assert process.returncode == 0, output
    finally:
        for process in pods:
            process.kill()
    summary = json.loads((tmp_path / "summary.json").read_text(encoding="utf-8"))
    assert (summary["world_size"], summary["epoch"], summary["resumed_from"]) == (2 * num_pods, 1, None)


def test_a_pod_slice_is_started_by_one_command_on_all_workers() -> None:
    environment = os.environ | {
        "DRY_RUN": "1",
        "TPU_NAME": "my-pod",
        "ZONE": "us-central2-b",
        "PYTHON": "/env/bin/python",
    }
    command = ["bash", str(LAUNCH / "tpu_pod.sh"), "--output-dir", "/mnt/a folder", "--resume"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=PROGRAM_LIMIT_S, check=True)
    *start, remote = done.stdout.splitlines()
    assert " ".join(start) == "gcloud compute tpus tpu-vm ssh my-pod --zone us-central2-b --worker all --command"
    assert remote.endswith("PYTHON=/env/bin/python bash launch/xla_spawn.sh --output-dir /mnt/a\\ folder --resume")
    assert shlex.split(remote)[-2:] == ["/mnt/a folder", "--resume"]
    stop = subprocess.run(
        command, env=environment | {"STOP": "1"}, capture_output=True, text=True, timeout=PROGRAM_LIMIT_S, check=True
    ).stdout
    assert "pkill -f launch/train_digits.py" in stop


def test_a_pod_slice_needs_a_name() -> None:
    environment = {name: value for name, value in os.environ.items() if name not in ("TPU_NAME", "ZONE")}
    command = ["bash", str(LAUNCH / "tpu_pod.sh")]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=PROGRAM_LIMIT_S, check=False
    )
    assert done.returncode != 0
    assert "name of the TPU slice, needed" in done.stderr
