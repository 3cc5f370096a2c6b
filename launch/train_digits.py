"""Train a small convolutional network on real handwritten digits, on any number of ranks, and survive.

    PYTHONPATH=. python launch/train_digits.py            # one process
    bash launch/torchrun.sh                               # two ranks; its header tells about several machines
    bash launch/horovodrun.sh                             # two ranks of Horovod
    bash launch/xla_spawn.sh                              # a replica of torch_xla's on each device
    PYTHONPATH=. python launch/train_digits.py --help     # all options

``main(local_rank, config)`` runs on each rank, with any launcher. All random numbers depend only on seed, epoch and
rank, or their state is saved. A run that was killed or stopped in the middle of an epoch, and then resumed, therefore
ends with the parameters of an undisturbed run.
"""

import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import launchers
import options
import torch
from batches import TrainBatches
from die_in_save import DieInSave
from digits import Net, Samples, load
from faults import num_restarts
from ignite.engine import Engine, Events
from ignite.metrics import Accuracy, Loss
from options import Config
from report import Display, Summary, digest
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ExponentialLR

from distckpt import (
    Checkpoint,
    DiskSaver,
    EarlyStopping,
    Preemption,
    RngState,
    TerminateOnNan,
    TimeLimit,
    Timer,
    all_gather,
    broadcast,
    device,
    get_rank,
    get_world_size,
    global_step_from_engine,
    resume,
    stop_reason,
)


class Parallelism(Protocol):
    """How the ranks share the work: what differs between this script and train_fsdp.py.

    Attributes:
        name: a few words for the summary.
        data_rank: which share of a batch this rank trains.
        data_world_size: number of shares of a batch.
    """

    name: str
    data_rank: int
    data_world_size: int

    def build(self, config: Config) -> tuple[nn.Module, nn.Module, Optimizer]:
        """Return the model as it is trained, the network in it, and the optimizer. Collective with several ranks."""

    def state_of(self, net: nn.Module) -> dict[str, Tensor]:
        """Return the whole tensors of the network's state. Collective where they are sharded."""

    def spread(self, tensor: Tensor) -> Tensor:
        """Return a tensor as the model's are: equal on all ranks, or sharded. Collective where it is sharded."""


class Replicas:
    """A full copy of the network on each rank. Each trains its share of a batch, and gradients are averaged."""

    def __init__(self, config: Config) -> None:
        del config
        self.data_rank, self.data_world_size = get_rank(), get_world_size()
        self.name = f"{self.data_world_size} ranks"

    def build(self, config: Config) -> tuple[nn.Module, nn.Module, Optimizer]:
        """Return the model, the network in it, and the optimizer."""
        net = launchers.initial(Net, config.seed)
        model = launchers.parallelize(net)
        return model, net, launchers.distribute(torch.optim.AdamW(model.parameters(), lr=config.lr), model)

    def state_of(self, net: nn.Module) -> dict[str, Tensor]:
        """Return the network's state."""
        return net.state_dict()

    def spread(self, tensor: Tensor) -> Tensor:
        """Return the tensor."""
        return tensor


def main(local_rank: int, config: Config, make_parallelism: Callable[[Config], Parallelism] = Replicas) -> None:
    """Train on this rank. Collective: every rank of the job calls it, with the same arguments."""
    del local_rank  # ``device()`` is this rank's already
    refuse_to_mix_runs(config)
    rank, world_size = get_rank(), get_world_size()
    logging.basicConfig(format=f"rank {rank}: %(levelname)s: %(message)s")  # distckpt's warnings go to stderr
    backend = launchers.live_backend(config) or "one process"
    parallelism = make_parallelism(config)
    ranks = f"{parallelism.name}, {backend}" if world_size > 1 else backend
    display = Display(f"digits on {device().type}, {ranks}", is_shown=rank == 0)
    timer = Timer()

    data_rank, data_world_size = parallelism.data_rank, parallelism.data_world_size
    train_samples, val_samples = load(device())
    batches = TrainBatches(
        train_samples, batch_size=config.batch_size, seed=config.seed, rank=data_rank, world_size=data_world_size
    )
    run = build(config, parallelism, val_samples.take(slice(data_rank, None, data_world_size)))
    display.attach(run.trainer)

    checkpoint = resume(run.to_resume, run.latest, engine=run.trainer) if resumes(config) else None
    resumed_from = None if checkpoint is None else checkpoint.name
    first_epoch = run.trainer.state.epoch + 1
    if resumes(config):
        what = f"resuming from {resumed_from}" if resumed_from else "nothing to resume from: starting afresh"
        display.say(what)
    try:
        if run.is_to_go_on(config):
            run.trainer.run(batches, max_epochs=config.epochs, epoch_length=len(batches))
    finally:
        display.close()
        run.fault.close()

    iterations, trained = all_gather(run.trainer.state.iteration), all_gather(run.trained_samples())
    parameters = parallelism.state_of(run.net)
    if rank == 0:
        show(
            run,
            config,
            display,
            resumed_from=resumed_from,
            first_epoch=first_epoch,
            iterations=iterations,
            trained=trained[:: world_size // data_world_size],  # ranks that train the same samples follow each other
            parameters=parameters,
            backend=backend,
            seconds=timer.value(),
        )
    if stop_reason(run.trainer) == "preempted" and config.preempted_exit_code:
        sys.exit(config.preempted_exit_code)


def show(
    run: "Run",
    config: Config,
    display: Display,
    *,
    resumed_from: str | None,
    first_epoch: int,
    iterations: list[int],
    trained: list[dict[str, list[int]]],
    parameters: dict[str, Tensor],
    backend: str,
    seconds: float,
) -> None:
    """Show and write what the run came to. Rank-local."""
    newest_best = run.best.last_checkpoint
    summary = Summary(
        stopped=run.why_it_stopped(config),
        resumed_from=resumed_from,
        first_epoch=first_epoch,
        epoch=run.trainer.state.iteration // (run.trainer.state.epoch_length or 1),
        iterations=iterations,
        samples={epoch: [number for one in trained for number in one[epoch]] for epoch in trained[0]},
        val_acc=run.trainer.state.metrics.get("val_acc"),
        best_val_acc=run.early_stopping.best_score,
        parameters_sha256=digest(parameters),
        checkpoints=sorted(path.name for path in config.output_dir.glob("*.pt")),
        best_checkpoint=None if newest_best is None else Path(newest_best).name,
        world_size=get_world_size(),
        backend=backend,
        seconds=seconds,
    )
    if config.table:
        display.table(summary, config.output_dir)
    if config.summary is not None:
        summary.write(config.summary)


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """The engines of one run, and what a resumed one has to get back."""

    trainer: Engine
    net: nn.Module
    best: Checkpoint
    latest: Checkpoint
    early_stopping: EarlyStopping
    to_resume: dict[str, Any]
    fault: DieInSave
    seen: dict[int, list[Tensor]]

    def trained_samples(self) -> dict[str, list[int]]:
        """Return the numbers of the samples that this rank has trained in the first and last epoch of the process."""
        ends = {str(epoch): self.seen[epoch] for epoch in sorted(self.seen)[:1] + sorted(self.seen)[-1:]}
        return {epoch: torch.cat(numbers).tolist() for epoch, numbers in ends.items()}

    def has_stopped_early(self, config: Config) -> bool:
        """Tell whether early stopping has had enough, in this process or before a resume."""
        return bool(self.early_stopping.counter >= config.patience)

    def is_to_go_on(self, config: Config) -> bool:
        """Tell whether there is an epoch left to train."""
        return self.trainer.state.epoch < config.epochs and not self.has_stopped_early(config)

    def why_it_stopped(self, config: Config) -> str:
        """Say why no further epoch follows. The same on every rank."""
        reason = stop_reason(self.trainer)
        if reason is None and not self.has_stopped_early(config):
            return f"all {config.epochs} epochs done"
        return {
            "nan": "the loss is no finite number",
            "time_limit": f"time limit of {config.time_limit_s} s",
            "preempted": "told to stop by a signal: saved",
        }.get(reason or "", f"early: no better accuracy in {config.patience} epochs")


def build(config: Config, parallelism: Parallelism, val_samples: Samples) -> Run:
    """Make model, engines and handlers. Collective where there are several ranks."""
    model, net, optimizer = parallelism.build(config)
    scheduler = ExponentialLR(optimizer, gamma=0.9)

    seen: dict[int, list[Tensor]] = {}

    def train_step(engine: Engine, batch: Samples) -> float:
        seen.setdefault(engine.state.epoch, []).append(batch.numbers)
        model.train()
        optimizer.zero_grad()
        loss = functional.cross_entropy(model(batch.images), batch.labels)
        loss.backward()  # type: ignore[no-untyped-call] # torch ships it without types
        launchers.step(optimizer)
        if config.fault is None:
            return loss.item()
        return config.fault.strike(engine.state.iteration, get_rank(), loss.item())

    def val_step(_: Engine, batch: Samples) -> tuple[Tensor, Tensor]:
        model.eval()
        with torch.no_grad():
            return model(batch.images), batch.labels

    trainer, evaluator = Engine(train_step), Engine(val_step)
    Accuracy(device=launchers.metrics_device()).attach(evaluator, "val_acc")
    Loss(functional.cross_entropy, device=launchers.metrics_device()).attach(evaluator, "val_loss")
    # The last epoch's figures travel with the trainer's state: a run with nothing left to do knows them too.
    trainer.state_dict_user_keys.append("metrics")

    @trainer.on(Events.EPOCH_STARTED)
    def fix_randomness() -> None:
        epoch = trainer.state.epoch
        # Dropout differs between samples, and not between ranks that compute parts of the same ones.
        launchers.seed_step((config.seed * 1_000_003 + epoch) * 4099 + parallelism.data_rank)

    # From here on the order of the lines is the order of what happens at the end of an epoch.
    @trainer.on(Events.EPOCH_COMPLETED)
    def validate() -> None:
        trainer.state.metrics = dict(evaluator.run([val_samples]).metrics)
        scheduler.step()

    def accuracy(engine: Engine) -> float:
        return float(engine.state.metrics["val_acc"])

    saver = DiskSaver(config.output_dir, require_empty=not resumes(config), record_events=True)
    best = Checkpoint(
        {"model": model},
        saver,
        "best",
        score_function=accuracy,
        score_name="val_acc",
        n_saved=2,
        global_step_transform=global_step_from_engine(trainer),
    )
    early_stopping = EarlyStopping(config.patience, accuracy, trainer)
    evaluator.add_event_handler(Events.COMPLETED, best)
    evaluator.add_event_handler(Events.COMPLETED, early_stopping)

    to_resume = {
        "model": model,
        "optimizer": optimizer,
        "lr_scheduler": scheduler,
        "trainer": trainer,
        "early_stopping": early_stopping,
        "best": best,
        "rng": RngState(trainer),
    }
    latest = Checkpoint(
        to_resume
        | {"ballast": Ballast(parallelism.spread(torch.full((config.ballast_mb << 20,), 7, dtype=torch.uint8)))},
        saver,
        "latest",
        n_saved=1,
        global_step_transform=global_step_from_engine(trainer),
        include_self=True,
    )
    half_bytes = max(config.ballast_mb << 19, 1)
    fault = DieInSave(config.output_dir, config.die_in_save, at_bytes=half_bytes, is_saving_rank=get_rank() == 0)
    for handler in (fault.before, latest, fault.after):
        trainer.add_event_handler(Events.EPOCH_COMPLETED(every=config.save_every), handler)
    trainer.add_event_handler(Events.ITERATION_COMPLETED, TerminateOnNan())
    trainer.add_event_handler(Events.ITERATION_COMPLETED, TimeLimit(config.time_limit_s))
    Preemption(trainer, latest, grace_s=config.grace_s)

    return Run(
        trainer=trainer,
        net=net,
        best=best,
        latest=latest,
        early_stopping=early_stopping,
        to_resume=to_resume,
        fault=fault,
        seen=seen,
    )


def refuse_to_mix_runs(config: Config) -> None:
    """End this run where another one's checkpoints lie in its directory. Collective: rank 0 looks for all."""
    is_taken = get_rank() == 0 and not resumes(config) and any(config.output_dir.glob("*.pt"))
    if broadcast(int(is_taken), src=0):
        way_out = "--resume goes on from the newest, another --output-dir starts afresh"
        sys.exit(f"{config.output_dir} holds another run's checkpoints: {way_out}" if get_rank() == 0 else 1)


def resumes(config: Config) -> bool:
    """Tell whether to go on from a checkpoint: asked for, or started again by torchrun (``--max-restarts``)."""
    return config.resume or num_restarts() > 0


class Ballast:
    """Bytes that make a checkpoint larger and teach nothing."""

    def __init__(self, values: Tensor) -> None:
        self._values = values

    def state_dict(self) -> dict[str, Tensor]:
        """Return the bytes: uint8 (N,)."""
        return {"bytes": self._values}


if __name__ == "__main__":
    launchers.run(main, options.parse())
