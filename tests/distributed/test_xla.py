"""What only an XLA job has: graphs compiled once, states computed late, ignite's metrics, `xm.save`'s options."""

import importlib
import importlib.metadata
import itertools
import subprocess
import sys
import textwrap
import threading
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import pytest
import torch
from ignite.engine import Engine, Events
from ignite.metrics import Accuracy, Loss
from torch import nn

import distckpt
from distckpt import Checkpoint, DiskSaver, EarlyStopping, ModelCheckpoint, TerminateOnNan, TimeLimit, Timer, resume
from distckpt.backends.detect import current
from tests.support import job, run_distributed, run_ranks
from tests.support.limits import PROGRAM_LIMIT_S
from tests.support.selection import only_on

pytestmark = only_on("xla", why="about XLA's graphs and devices")

SEEDING = threading.Lock()
"""The replicas of a process have one generator on the host."""
NUM_ITERATIONS, EPOCH_LENGTH = 50, 2


def metric(name: str) -> int:
    """Return how often something happened in this process, by torch_xla's own count."""
    metrics = importlib.import_module("torch_xla.debug.metrics")
    data = metrics.metric_data(name)
    return 0 if data is None else int(data[0])


class Training:
    """A small training with every handler attached, whose output stays on the device."""

    def __init__(self, folder: Path) -> None:
        with SEEDING:
            torch.manual_seed(1)
            network = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
        model, self.optimizer, self._step = job.data_parallel(
            network, lambda parameters: torch.optim.AdamW(parameters, lr=0.01)
        )
        self.model = model
        self.data = [
            (
                torch.randn(4, 8, generator=torch.Generator().manual_seed(number)).to(job.device()),
                torch.arange(4).remainder(3).to(job.device()),
            )
            for number in range(EPOCH_LENGTH)
        ]
        self.trainer, self.evaluator = Engine(self._train), Engine(self._evaluate)
        Accuracy(device="cpu").attach(self.evaluator, "accuracy")
        Loss(nn.functional.cross_entropy, device="cpu").attach(self.evaluator, "loss")
        to_save = {"model": model, "optimizer": self.optimizer, "trainer": self.trainer}
        self.latest = Checkpoint(to_save, DiskSaver(folder / "latest"), n_saved=2)
        best = ModelCheckpoint(folder / "best", "net", score_name="accuracy", global_step_transform=lambda *_: 0)
        patience = EarlyStopping(1000, lambda engine: engine.state.metrics["accuracy"], self.trainer)
        self.trainer.add_event_handler(Events.ITERATION_COMPLETED, TerminateOnNan())
        self.trainer.add_event_handler(Events.ITERATION_COMPLETED, TimeLimit(3600))
        self.trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda: self.evaluator.run(self.data))
        self.trainer.add_event_handler(Events.EPOCH_COMPLETED, self.latest)
        self.evaluator.add_event_handler(Events.COMPLETED, best, {"model": model})
        self.evaluator.add_event_handler(Events.COMPLETED, patience)
        self.timer = Timer(average=True)
        self.timer.attach(self.trainer, step=Events.ITERATION_COMPLETED)

    def _train(self, _engine: Engine, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        self.optimizer.zero_grad()
        loss = nn.functional.cross_entropy(self.model(batch[0]), batch[1])
        loss.backward()  # type: ignore[no-untyped-call]  # torch ships it without types
        self._step()
        return loss.detach()

    def _evaluate(self, _engine: Engine, batch: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.no_grad():
            return self.model(batch[0]), batch[1]


def compilations(folder: Path) -> tuple[list[int], int]:
    """Train; return how many graphs there were after some iterations, and the last iteration."""
    training, counts = Training(folder), list[int]()
    for iteration in (2, 6, NUM_ITERATIONS):
        training.trainer.add_event_handler(
            Events.ITERATION_STARTED(once=iteration), lambda: counts.append(metric("CompileTime"))
        )
    training.trainer.run(training.data, max_epochs=NUM_ITERATIONS // EPOCH_LENGTH)
    counts.append(metric("CompileTime"))
    assert training.timer.value() > 0
    return counts, training.trainer.state.iteration


def test_fifty_iterations_with_all_handlers_compile_nothing_after_the_fifth(tmp_path: Path) -> None:
    results = run_ranks(compilations, 2, tmp_path, fresh=True)
    assert [last for _, last in results] == [NUM_ITERATIONS] * 2
    for (after_1, after_5, before_50, after_50), _ in results:
        assert 0 < after_1 < after_5, "it does count"
        assert after_5 == before_50 == after_50
    _, after_5, _, after_50 = results[0][0]
    print(  # noqa: T201 - for the record
        f"graphs compiled by 2 replicas: {after_5} until iteration 5, {after_50 - after_5} in 6 to {NUM_ITERATIONS}"
    )


class Lazy:
    """An object whose state is on the device: computed, or a chain of operations that nobody has asked for yet.

    Args:
        is_pending: which of the two.
    """

    def __init__(self, *, is_pending: bool) -> None:
        self._is_pending = is_pending
        self._computed = self._chain()
        importlib.import_module("torch_xla").sync()

    def _chain(self) -> dict[str, Any]:
        base = torch.ones(4, device=job.device())
        return {"one": base * 2 + 1, "two": (base - 3).abs(), "three": [base.cumsum(0)]}

    def state_dict(self) -> dict[str, Any]:
        """Return the tensors."""
        return self._chain() if self._is_pending else dict(self._computed)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take nothing over."""


def executions_of_a_save(folder: Path, *, is_pending: bool) -> list[int]:
    """Return how many graphs each save of a row made the two replicas run, after the first."""
    handler = Checkpoint({"lazy": Lazy(is_pending=is_pending)}, folder, n_saved=None)
    engine, counts = Engine(lambda _engine, _batch: None), list[int]()
    engine.add_event_handler(Events.EPOCH_COMPLETED, job.store_barrier)
    engine.add_event_handler(Events.EPOCH_COMPLETED, lambda: counts.append(metric("ExecuteTime")))
    engine.add_event_handler(Events.EPOCH_COMPLETED, job.store_barrier)
    engine.add_event_handler(Events.EPOCH_COMPLETED, handler)
    engine.run([0], max_epochs=6)
    job.store_barrier()
    return [after - before for before, after in itertools.pairwise(counts[1:])]


@run_distributed(world_size=2)
def test_a_save_computes_what_is_pending_once_on_every_replica(tmp_path: Path) -> None:
    computed = executions_of_a_save(tmp_path / "computed", is_pending=False)
    pending = executions_of_a_save(tmp_path / "pending", is_pending=True)
    assert len(set(computed)) == len(set(pending)) == 1, (computed, pending)
    assert pending[0] - computed[0] == job.world_size(), "one graph more on each replica"


@run_distributed(world_size=2)
def test_values_and_devices_come_back(tmp_path: Path) -> None:
    training = Training(tmp_path)
    training.trainer.run(training.data, max_epochs=1)
    expected = [parameter.detach().cpu().clone() for parameter in training.model.parameters()]
    assert training.latest.last_checkpoint is not None
    job.store_barrier()
    stored = torch.load(training.latest.last_checkpoint, weights_only=True)
    tensors = [*stored["model"].values(), *[one["exp_avg"] for one in stored["optimizer"]["state"].values()]]
    assert {tensor.device.type for tensor in tensors} == {"cpu"}, "any machine can open it"
    twin = Training(tmp_path / "twin")
    resume({"model": twin.model, "optimizer": twin.optimizer}, tmp_path / "latest")
    for parameter, value in zip(twin.model.parameters(), expected, strict=True):
        assert parameter.device == job.device()
        assert torch.equal(parameter.detach().cpu(), value)
    moments = [state["exp_avg"].device for state in twin.optimizer.state.values()]
    assert moments == [job.device()] * len(moments)


@run_distributed(world_size=2)
def test_idist_and_metrics_answer_as_under_gloo(tmp_path: Path) -> None:
    rank, size = job.rank(), job.world_size()
    assert (idist.get_rank(), idist.get_world_size()) == (rank, size)
    assert (idist.get_local_rank(), idist.get_node_rank()) == (rank, 0)
    assert idist.device() == job.device()
    assert idist.backend() == "xla-tpu"
    assert (idist.get_nnodes(), idist.get_nproc_per_node()) == (1, size)
    assert idist.all_reduce(rank + 1) == 3
    assert torch.equal(torch.as_tensor(idist.all_reduce(torch.tensor([rank + 1.0]), "MAX")), torch.tensor([2.0]))
    assert idist.all_gather(f"of rank {rank}") == ["of rank 0", "of rank 1"]
    assert torch.equal(torch.as_tensor(idist.all_gather(torch.tensor([rank]))), torch.tensor([0, 1]))
    assert idist.broadcast("word" if rank == 1 else "", src=1) == "word"
    idist.barrier()

    @idist.one_rank_only(rank=1, with_barrier=True)
    def write() -> None:
        (tmp_path / f"of rank {rank}").touch()

    write()
    assert [path.name for path in tmp_path.iterdir()] == ["of rank 1"]
    evaluator = Engine(lambda _engine, batch: batch)
    Accuracy(device="cpu").attach(evaluator, "accuracy")
    right, wrong = torch.tensor([[0.0, 1.0]]), torch.tensor([[1.0, 0.0]])
    target = torch.tensor([1])
    batches = [(right, target), (wrong if rank == 1 else right, target)]
    assert evaluator.run(batches).metrics["accuracy"] == 0.75, "of both replicas' samples"
    with pytest.raises(NotImplementedError, match="groups of some replicas"):
        idist.new_group([0])


@run_distributed(world_size=2)
def test_options_of_xm_save_are_honoured(tmp_path: Path) -> None:
    state = {"rank": torch.tensor([float(job.rank())], device=job.device())}
    one = DiskSaver(tmp_path / "one", create_dir=True, master_only=True, global_master=True)
    one(state, "state.pt")
    own = DiskSaver(tmp_path / f"rank{job.rank()}", create_dir=True, master_only=False)
    own(state, "state.pt")
    job.store_barrier()
    found = {str(path.relative_to(tmp_path)): torch.load(path)["rank"].item() for path in tmp_path.rglob("*.pt")}
    assert found == {"one/state.pt": 0.0, "rank0/state.pt": 0.0, "rank1/state.pt": 1.0}


@run_distributed(world_size=2)
def test_states_of_the_device_generator_come_back() -> None:
    generator = current().generators()["xla"]
    before = generator.get_state()
    drawn = torch.rand(3, device=job.device()).cpu()
    generator.set_state(before)
    assert torch.equal(torch.rand(3, device=job.device()).cpu(), drawn)
    assert (before.dtype, before.shape) == (torch.uint8, (8,))


def run_program(program: str) -> list[str]:
    """Run a program in this environment, outside of any job; return what it prints."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(program)],
        capture_output=True,
        text=True,
        timeout=PROGRAM_LIMIT_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [line for line in done.stdout.splitlines() if not line.startswith("[Gloo]")]


def test_a_job_of_another_runtime_stays_one_where_torch_xla_is_installed_and_imported() -> None:
    assert run_program(
        """
        import distckpt, torch, torch_xla, torch.distributed as dist
        print(distckpt.backend(), distckpt.get_world_size(), distckpt.device())
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        print(distckpt.backend(), distckpt.get_world_size(), distckpt.device())
        dist.destroy_process_group()
        print(torch_xla._XLAC._xla_runtime_is_initialized())
        """
    ) == ["None 1 cpu", "gloo 1 cpu", "False"]


def test_a_model_on_an_xla_device_or_a_word_makes_it_one() -> None:
    assert run_program(
        """
        import os
        os.environ["PJRT_DEVICE"] = "CPU"
        import distckpt, torch, torch_xla
        torch.nn.Linear(1, 1).to("xla")
        print(distckpt.backend(), distckpt.get_world_size(), distckpt.device())
        """
    ) == ["xla 1 xla:0"]
    assert run_program(
        """
        import os
        os.environ["PJRT_DEVICE"] = "CPU"
        import distckpt
        distckpt.initialize("xla")
        print(distckpt.backend(), distckpt.get_rank(), distckpt.device())
        """
    ) == ["xla 0 xla:0"]


def test_a_torch_xla_of_another_torch_is_refused_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {"torch": "2.13.0", "torch_xla": "2.9.0"}
    monkeypatch.setattr(importlib.metadata, "version", lambda package: versions[package])
    with pytest.raises(RuntimeError, match=r"pip install 'torch==2\.9\.\*' 'torch_xla==2\.9\.\*'"):
        distckpt.initialize("xla")


def test_replicas_of_a_forked_process_begin_their_first_backward_passes_together() -> None:
    """Without `take_turns` some three in a hundred such processes hang, or have no device to compute on."""
    exit_codes = run_program(
        """
        import os, signal, sys, threading
        sys.path.insert(0, "launch")
        os.environ |= {"PJRT_DEVICE": "CPU", "CPU_NUM_DEVICES": "3", "PJRT_CPU_ASYNC_CLIENT": "0"}
        os.environ["XLA_THREAD_POOL_SIZE"] = "10"
        import torch, torch_xla, xla_on_cpu
        from torch_xla._internal import pjrt

        def replica():
            xla_on_cpu.take_turns()
            total = torch.ones(2, requires_grad=True, device=torch_xla.device()).sum()
            together.wait()
            total.backward()

        for _ in range(40):
            if os.fork() == 0:
                signal.alarm(60)  # the signal ends a process whatever its threads wait for
                together = threading.Barrier(3)
                pjrt._run_thread_per_device(0, 1, replica, pjrt.initialize_multiprocess)
                os._exit(0)
            print(os.waitstatus_to_exitcode(os.wait()[1]))
        """
    )
    assert exit_codes == ["0"] * 40
