"""What only a Horovod job has: its elastic mode, its optimizer, and its own beginning and end."""

import contextlib
import http.client
import importlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

import distckpt
from distckpt import Checkpoint
from distckpt.backends.detect import current
from tests.distributed.programs import fire
from tests.support import job, run_distributed
from tests.support.limits import PROGRAM_LIMIT_S
from tests.support.selection import only_on

pytestmark = only_on("horovod", why="about Horovod's own modes")

ROOT = Path(__file__).resolve().parents[2]


def test_an_elastic_job_goes_on_from_the_newest_checkpoint_without_the_rank_that_was_killed(tmp_path: Path) -> None:
    hosts = tmp_path / "hosts.sh"  # two names of this machine: Horovod gives up the host of a rank that died
    hosts.write_text("#!/bin/sh\necho localhost:1\necho 127.0.0.1:1\n", encoding="utf-8")
    hosts.chmod(0o755)
    command = [sys.executable, "-m", "horovod.runner.launch", "--gloo", "-np", "2", "--min-np", "1", "--max-np", "2"]
    command += ["--host-discovery-script", str(hosts), "--network-interfaces", "lo"]
    command += [sys.executable, str(Path(__file__).with_name("elastic_program.py")), str(tmp_path)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HOROVOD_", "PYTEST_"))}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=PROGRAM_LIMIT_S, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "killed").exists()
    result = json.loads((tmp_path / "result.json").read_text(encoding="utf-8"))
    assert result["seen"] == [[2, None], [1, "checkpoint_10.pt"], 20]
    assert result["files"] == ["checkpoint_15.pt", "checkpoint_20.pt"]


@run_distributed(world_size=2)
def test_a_distributed_optimizer_is_saved_and_restored(tmp_path: Path) -> None:
    def make(value: float) -> tuple[nn.Module, torch.optim.Optimizer, Any]:
        model = nn.Linear(2, 1)
        nn.init.constant_(model.weight, value)
        nn.init.constant_(model.bias, value)
        return job.data_parallel(model, lambda parameters: torch.optim.AdamW(parameters, lr=0.1))

    model, optimizer, step = make(1.0)
    assert type(optimizer).__module__.startswith("horovod"), "it is Horovod's"
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.full((4, 2), job.rank() + 1.0)).sum().backward()
        step()
    fire(Checkpoint({"model": model, "optimizer": optimizer}, tmp_path))
    job.barrier()
    twin, restored, step_of_twin = make(5.0)
    Checkpoint.load_objects({"model": twin, "optimizer": restored}, tmp_path / "checkpoint_1.pt")
    for one, other in zip(optimizer.state.values(), restored.state.values(), strict=True):
        assert torch.equal(one["exp_avg"], other["exp_avg"])
        assert one["step"] == other["step"] == 3
    for network, go in ((model, step), (twin, step_of_twin)):
        network.zero_grad()
        network(torch.full((4, 2), job.rank() + 1.0)).sum().backward()
        go()
    assert all(map(torch.equal, model.parameters(), twin.parameters())), "they go on alike"


@run_distributed(world_size=2)
def test_a_job_may_be_left_and_begun_again() -> None:
    first = current()
    assert (first.name, first.next_object_id("Checkpoint")) == ("horovod", "Checkpoint#0")
    assert distckpt.all_reduce(1) == 2
    for _ in range(2):
        distckpt.finalize()
        assert (distckpt.backend(), distckpt.get_world_size()) == (None, 1)
        distckpt.initialize("horovod")
        again = current()
        assert again is not first
        assert again.next_object_id("Checkpoint") == "Checkpoint#0", "counted anew"
        assert distckpt.all_gather(distckpt.get_rank()) == [0, 1]


@run_distributed(world_size=2)
def test_addresses_that_stayed_on_the_launchers_server_are_forgotten_before_a_job_is_begun_again() -> None:
    server = (os.environ["HOROVOD_GLOO_RENDEZVOUS_ADDR"], int(os.environ["HOROVOD_GLOO_RENDEZVOUS_PORT"]))
    rank = job.rank()
    distckpt.finalize()
    if rank == 0:
        with contextlib.closing(http.client.HTTPConnection(*server, timeout=10.0)) as connection:
            for scope in ("global", "local_localhost"):
                for method in ("PUT", "PUT", "DELETE"):  # as it is left where one rank's leave was not counted
                    connection.request(method, f"/{scope}/0", body=bytes(64) if method == "PUT" else None)
                    connection.getresponse().read()
        time.sleep(1.0)  # rank 1 is there first, and would call rank 0 by what it finds
    distckpt.initialize("horovod")
    assert distckpt.all_gather(distckpt.get_rank()) == [0, 1]


@run_distributed(world_size=2, backend=None)
def test_horovod_that_is_imported_and_not_initialised_takes_no_part() -> None:
    hvd = importlib.import_module("horovod.torch")
    assert not hvd.is_initialized()
    assert (distckpt.backend(), distckpt.get_rank(), distckpt.get_world_size()) == (None, 0, 1)
    hvd.init()
    assert (distckpt.backend(), distckpt.get_rank(), distckpt.get_world_size()) == ("horovod", hvd.rank(), 2)
