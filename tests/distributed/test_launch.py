"""The training script under its launchers: real processes, real data, a real SIGKILL.

A new launcher needs an entry in ``LAUNCHERS``, and its name in ``OF_THIS_RUNTIME``.
"""

import contextlib
import fcntl
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.support import run_distributed
from tests.support.limits import PROGRAM_LIMIT_S
from tests.support.runtime import RUNTIME
from tests.support.selection import full_only, quick, torch_only

ROOT = Path(__file__).resolve().parents[2]
LAUNCH = ROOT / "launch"
TRAIN = [sys.executable, str(LAUNCH / "train_digits.py")]
TORCHRUN = ["bash", str(LAUNCH / "torchrun.sh")]


@dataclass(frozen=True, slots=True)
class Launcher:
    """A way to start the script, and the world that comes of it."""

    command: Sequence[str]
    world_size: int


LAUNCHERS = {
    "python": Launcher(TRAIN, 1),
    "spawn": Launcher([*TRAIN, "--backend", "gloo", "--nproc-per-node", "2"], 2),
    "torchrun": Launcher(TORCHRUN, 2),
    "horovodrun": Launcher(["bash", str(LAUNCH / "horovodrun.sh")], 2),
    "xla_spawn": Launcher(["bash", str(LAUNCH / "xla_spawn.sh")], 2),
}
OF_THIS_RUNTIME = {"gloo": ["torchrun", "python"], "horovod": ["horovodrun"], "xla": ["xla_spawn"]}[RUNTIME]


@contextlib.contextmanager
def started(command: Sequence[str], **environment: str) -> Iterator[subprocess.Popen[str]]:
    """Start a launcher; whatever happens in the body, it and its ranks end."""
    base = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "PYTEST_"))}
    base |= {"PYTHON": sys.executable, "NPROC_PER_NODE": "2", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    mark = uuid.uuid4().hex
    base |= {"DISTCKPT_TEST_MARK": mark}
    # Optimizing the code that torch_xla compiles takes a seventh of a short run.
    base |= {"XLA_FLAGS": "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"}
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, env=base | environment, stdout=pipe, stderr=pipe, text=True)
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()  # torchrun passes it on to its ranks, and waits for them
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.communicate(timeout=PROGRAM_LIMIT_S)
        _kill_marked(mark)
        process.communicate(timeout=PROGRAM_LIMIT_S)


def _kill_marked(mark: str) -> None:
    """Kill ranks that have outlived their launcher: those with a mark in their environment."""
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # another user's, or it has ended
            if mark.encode() in (folder / "environ").read_bytes():
                os.kill(int(folder.name), signal.SIGKILL)


def train(
    command: Sequence[str],
    directory: Path,
    *options: str,
    succeeds: bool = True,
    environment: Mapping[str, str] | None = None,
) -> str:
    """Run the script to its end and return what it printed."""
    options = ("--output-dir", str(directory), "--summary", str(directory / "summary.json"), *options)
    with started([*command, *options], **(environment or {})) as process:
        stdout, stderr = process.communicate(timeout=PROGRAM_LIMIT_S)
        assert (process.returncode == 0) is succeeds, stdout + stderr
    return stdout if succeeds else stdout + stderr


def summary_in(directory: Path) -> dict[str, Any]:
    summary: dict[str, Any] = json.loads((directory / "summary.json").read_text(encoding="utf-8"))
    return summary


def unfinished_in(directory: Path) -> list[Path]:
    return [path for path in directory.iterdir() if path.suffix not in {".pt", ".json", ".jsonl"}]


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return the summary of four epochs under this runtime's first launcher: one run for all pytest processes."""
    root = tmp_path_factory.getbasetemp()
    directory = (root.parent if "PYTEST_XDIST_WORKER" in os.environ else root) / "undisturbed"
    directory.mkdir(exist_ok=True)
    with (directory / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (directory / "output").exists():
            output = train(LAUNCHERS[OF_THIS_RUNTIME[0]].command, directory / "run", "--epochs", "4")
            (directory / "output").write_text(output, encoding="utf-8")
    summary = summary_in(directory / "run")
    assert summary["stopped"] == "all 4 epochs done"
    assert summary["stopped"] in (directory / "output").read_text(encoding="utf-8")
    return summary


@quick(1)
@pytest.mark.slow
@pytest.mark.parametrize("name", OF_THIS_RUNTIME)
def test_run_killed_in_the_middle_of_a_save_resumes_to_the_same_parameters(
    name: str, tmp_path: Path, undisturbed: dict[str, Any]
) -> None:
    launcher, killed, expected = LAUNCHERS[name], tmp_path / "killed", undisturbed
    if name != OF_THIS_RUNTIME[0]:
        train(launcher.command, tmp_path / "undisturbed", "--epochs", "4")
        expected = summary_in(tmp_path / "undisturbed")
    assert expected["world_size"] == launcher.world_size
    assert (expected["resumed_from"], expected["first_epoch"], expected["epoch"]) == (None, 1, 4)
    assert expected["val_acc"] > 0.9
    assert len(expected["checkpoints"]) == 3
    assert expected["checkpoints"][-1] == "latest_checkpoint_4.pt"
    assert expected["best_checkpoint"].endswith(f"val_acc={expected['best_val_acc']:.4f}.pt")

    fault = ("--ballast-mb", "64", "--die-in-save", "2")
    train(launcher.command, killed, "--epochs", "4", *fault, succeeds=False)
    left = unfinished_in(killed)
    assert len(left) == 1, "the rank was to be killed in the middle of a save"
    assert left[0].stat().st_size > 1 << 20
    (newest,) = killed.glob("latest_*.pt")
    content = torch.load(newest, weights_only=True, mmap=True)
    last_epoch = content["trainer"]["iteration"] // content["trainer"]["epoch_length"]
    assert newest.name == f"latest_checkpoint_{last_epoch}.pt"

    shown = train(launcher.command, killed, "--epochs", "4", "--resume")
    resumed = summary_in(killed)
    assert f"resuming from {newest.name}" in shown
    assert (resumed["resumed_from"], resumed["first_epoch"]) == (newest.name, last_epoch + 1)
    assert not unfinished_in(killed)
    for key in ("stopped", "epoch", "val_acc", "best_val_acc", "parameters_sha256", "checkpoints"):
        assert resumed[key] == expected[key], key


@quick(1)
@torch_only
@pytest.mark.slow
@pytest.mark.parametrize(("num_ranks", "tp"), [(3, 1), (2, 1), (2, 2), (4, 2)])
def test_sharded_run_killed_in_a_save_resumes_on_other_ranks_and_plain_torch_opens_the_file(
    num_ranks: int, tp: int, tmp_path: Path
) -> None:
    sharded = {"SCRIPT": str(LAUNCH / "train_fsdp.py")}
    fault = ("--ballast-mb", "64", "--die-in-save", "2")
    train(TORCHRUN, tmp_path, "--epochs", "5", *fault, succeeds=False, environment=sharded)
    assert len(unfinished_in(tmp_path)) == 1, "the rank was to be killed in the middle of a save"
    (newest,) = tmp_path.glob("latest_*.pt")
    environment = sharded | {"NPROC_PER_NODE": str(num_ranks)}
    shown = train(TORCHRUN, tmp_path, "--epochs", "5", "--resume", "--tp", str(tp), environment=environment)
    assert f"resuming from {newest.name}" in shown
    assert not unfinished_in(tmp_path)
    summary = summary_in(tmp_path)
    assert (summary["epoch"], summary["world_size"]) == (5, num_ranks)
    assert summary["checkpoints"][-1] == "latest_checkpoint_5.pt"
    assert accuracy_in(tmp_path / "latest_checkpoint_5.pt") == pytest.approx(summary["val_acc"], abs=0.01)
    assert summary["val_acc"] > 0.85
    if num_ranks == 2 and tp == 1:
        train(TORCHRUN, tmp_path / "undisturbed", "--epochs", "5", environment=sharded)
        assert summary["parameters_sha256"] == summary_in(tmp_path / "undisturbed")["parameters_sha256"]


def accuracy_in(checkpoint: Path) -> float:
    """Return what a script prints that imports neither distckpt nor torch.distributed."""
    bare = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}  # distckpt is not installed
    command = [sys.executable, str(LAUNCH / "accuracy.py"), str(checkpoint)]
    ended = subprocess.run(command, env=bare, capture_output=True, text=True, timeout=PROGRAM_LIMIT_S, check=True)
    return float(ended.stdout.removeprefix("accuracy "))


@full_only
@torch_only
def test_sharded_run_goes_on_in_one_process_without_a_process_group(tmp_path: Path) -> None:
    script = str(LAUNCH / "train_fsdp.py")
    train(TORCHRUN, tmp_path, "--epochs", "2", environment={"SCRIPT": script})
    train([sys.executable, script], tmp_path, "--epochs", "4", "--resume")
    summary = summary_in(tmp_path)
    assert (summary["first_epoch"], summary["epoch"], summary["world_size"]) == (3, 4, 1)
    assert summary["val_acc"] > 0.8


@torch_only
def test_tensor_parallelism_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    command = [sys.executable, str(LAUNCH / "train_fsdp.py"), "--tp", "2"]
    printed = train(command, tmp_path, succeeds=False)
    assert "--tp should divide the 1 ranks and the 4 heads, but given 2" in printed
    assert not list(tmp_path.iterdir())


@full_only
@torch_only
def test_two_nodes_train_as_one_job_and_have_nothing_to_resume_from(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    nodes = {"NNODES": "2", "NPROC_PER_NODE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    nodes |= {"LOCAL_ADDR": "127.0.0.1", "IFNAME": "lo"}
    command = [*TORCHRUN, "--output-dir", str(tmp_path), "--summary", str(tmp_path / "summary.json")]
    command += ["--epochs", "3", "--resume"]

    with (
        started(command, NODE_RANK="0", **nodes) as first,
        started(command, NODE_RANK="1", **nodes) as second,
    ):
        for process in (first, second):
            stdout, stderr = process.communicate(timeout=PROGRAM_LIMIT_S)
            assert process.returncode == 0, stdout + stderr
            assert ("nothing to resume from: starting afresh" in stdout) is (process is first)
    summary = summary_in(tmp_path)
    assert (summary["world_size"], summary["epoch"], summary["resumed_from"]) == (2, 3, None)
    assert summary["val_acc"] > 0.85


@full_only
@torch_only
def test_job_goes_on_with_another_number_of_ranks(tmp_path: Path) -> None:
    train(LAUNCHERS["spawn"].command, tmp_path, "--epochs", "2")
    assert summary_in(tmp_path)["world_size"] == 2
    train(LAUNCHERS["python"].command, tmp_path, "--epochs", "4", "--resume")
    summary = summary_in(tmp_path)
    assert (summary["first_epoch"], summary["epoch"], summary["world_size"]) == (3, 4, 1)
    assert summary["val_acc"] > 0.9


@full_only
@torch_only
def test_rank_that_is_killed_costs_the_steps_since_the_last_checkpoint(
    tmp_path: Path, undisturbed: dict[str, Any]
) -> None:
    shown = train(
        TORCHRUN, tmp_path / "killed", "--epochs", "4", "--fault", "sigkill@50:1", environment={"MAX_RESTARTS": "1"}
    )
    assert "resuming from latest_checkpoint_2.pt" in shown
    again = summary_in(tmp_path / "killed")
    assert (again["first_epoch"], again["resumed_from"]) == (3, "latest_checkpoint_2.pt")
    for key in ("stopped", "epoch", "iterations", "val_acc", "best_val_acc", "parameters_sha256", "checkpoints"):
        assert again[key] == undisturbed[key], key


@full_only
@torch_only
@pytest.mark.parametrize("code", [0, 75])
def test_rank_that_is_told_to_stop_stops_all_after_a_save_and_the_run_goes_on(
    code: int, tmp_path: Path, undisturbed: dict[str, Any]
) -> None:
    command = (*LAUNCHERS["spawn"].command, "--epochs", "4")
    told = ("--fault", "sigterm@30:1", "--preempted-exit-code", str(code))
    shown = train(command, tmp_path / "told", *told, succeeds=code == 0)
    stopped = summary_in(tmp_path / "told")
    assert stopped["iterations"] == [30, 30]
    assert stopped["stopped"] == "told to stop by a signal: saved"
    assert stopped["stopped"] in shown
    assert stopped["checkpoints"][-1] == "latest_checkpoint_2.pt"
    state = torch.load(tmp_path / "told" / "latest_checkpoint_2.pt", weights_only=True)
    assert state["trainer"]["iteration"] == 30
    train(command, tmp_path / "told", "--resume")
    again = summary_in(tmp_path / "told")
    for key in ("stopped", "epoch", "val_acc", "best_val_acc", "parameters_sha256", "checkpoints"):
        assert again[key] == undisturbed[key], key


@torch_only
def test_slurm_job_that_is_told_to_stop_saves_and_goes_back_into_the_queue(tmp_path: Path) -> None:
    stand_ins = tmp_path / "bin"
    stand_ins.mkdir()
    for name, body in {
        "srun": 'while [[ "$1" == --* ]]; do shift; done\nexec "$@"',
        "scontrol": f'[ "$1" = show ] && echo 127.0.0.1 || echo "$@" >> {tmp_path}/scontrol.log',
    }.items():
        (stand_ins / name).write_text(f"#!/usr/bin/env bash\n{body}\n", encoding="utf-8")
        (stand_ins / name).chmod(0o755)
    variables = {"SLURM_SUBMIT_DIR": str(ROOT), "SLURM_NNODES": "1", "SLURM_JOB_NODELIST": "here", "SLURM_JOB_ID": "7"}
    variables |= {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "1", "SLURM_NODEID": "0"}
    variables |= {"OUTPUT_DIR": str(tmp_path / "out"), "PATH": f"{stand_ins}:{os.environ['PATH']}"}
    command = ["bash", str(LAUNCH / "slurm.sbatch"), "--epochs", "400", "--patience", "999", "--save-every", "999"]
    with started(command, **variables) as job:
        deadline = time.monotonic() + PROGRAM_LIMIT_S
        while not list((tmp_path / "out").glob("best_*.pt")):  # the first epoch is over
            assert time.monotonic() < deadline
            assert job.poll() is None
            time.sleep(0.05)
        job.send_signal(signal.SIGTERM)
        stdout, stderr = job.communicate(timeout=PROGRAM_LIMIT_S)
    assert job.returncode == 0, stdout + stderr
    assert "told to stop: job 7 goes back into the queue" in stdout
    assert (tmp_path / "scontrol.log").read_text(encoding="utf-8") == "requeue 7\n"
    (latest,) = (tmp_path / "out").glob("latest_*.pt")
    assert torch.load(latest, weights_only=True)["trainer"]["iteration"] > 0


@pytest.fixture
def train_here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Run the script in this process, as a world of one: no start-up to wait for."""
    monkeypatch.syspath_prepend(str(LAUNCH))
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for path in LAUNCH.glob("*.py"):
        monkeypatch.delitem(sys.modules, path.stem, raising=False)
    launchers, options, script = (importlib.import_module(name) for name in ("launchers", "options", "train_digits"))

    def run(*arguments: str) -> dict[str, Any]:
        common = ["--output-dir", str(tmp_path), "--summary", str(tmp_path / "summary.json")]
        launchers.run(script.main, options.parse([*common, *arguments]))
        return summary_in(tmp_path)

    return run


@torch_only
@pytest.mark.parametrize(
    ("arguments", "stopped"),
    [
        (["--patience", "9999", "--time-limit-s", "1"], "time limit of 1 s"),
        (["--lr", "1e20"], "the loss is no finite number"),
        (["--lr", "1e-30", "--patience", "2"], "early: no better accuracy in 2 epochs"),
    ],
    ids=["time", "nan", "early"],
)
def test_run_that_ends_before_its_last_epoch_says_why(
    train_here: Callable[..., dict[str, Any]],
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    stopped: str,
) -> None:
    summary = train_here("--epochs", "9999", *arguments)
    assert summary["stopped"] == stopped
    assert stopped in capsys.readouterr().out


@torch_only
def test_finished_run_has_nothing_left_to_do_when_resumed(train_here: Callable[..., dict[str, Any]]) -> None:
    finished = train_here("--epochs", "2")
    resumed = train_here("--epochs", "2", "--resume")
    assert (resumed["first_epoch"], resumed["epoch"]) == (3, 2)
    for key in ("val_acc", "best_val_acc", "parameters_sha256", "checkpoints", "best_checkpoint"):
        assert resumed[key] == finished[key], key


@torch_only
@run_distributed(world_size=2)
def test_directory_of_another_run_is_refused_on_every_rank(tmp_path: Path) -> None:
    (tmp_path / "best_model_1_val_acc=0.5000.pt").touch()
    dist.barrier()
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(LAUNCH))
        patch.delenv("TORCHELASTIC_RESTART_COUNT", raising=False)  # a rank of the harness seems to be started again
        options, script = importlib.import_module("options"), importlib.import_module("train_digits")
        with pytest.raises(SystemExit) as refusal:
            script.main(0, options.parse(["--output-dir", str(tmp_path)]))
    if dist.get_rank() == 0:
        assert "holds another run's checkpoints: --resume goes on" in str(refusal.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best_model_1_val_acc=0.5000.pt"]


@torch_only
@pytest.mark.parametrize("script", sorted([*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch")]), ids=lambda path: path.name)
def test_bash_parses_every_launcher(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True, timeout=10)
    assert script.read_text(encoding="utf-8").startswith("#!/usr/bin/env bash\n# ")
