"""All access to private names of Lightning.

Lightning calls no method of a callback after the validation of a step or of an epoch, and continues in the middle of an
epoch with the first batches of a plain DataLoader. So methods of one Trainer's loops are wrapped for one ``fit()``.
``tests/integrations/test_lightning_hooks.py`` checks each name and statement of Lightning that this module relies on.
"""

import functools
import math
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from copy import deepcopy
from typing import Any

from pytorch_lightning import Trainer
from pytorch_lightning.callbacks import GradientAccumulationScheduler
from pytorch_lightning.loops.fetchers import _PrefetchDataFetcher
from pytorch_lightning.strategies import DDPStrategy, SingleDeviceStrategy


class FitHooks(ABC):
    """What a Trainer calls while it fits, on all ranks."""

    @abstractmethod
    def before_epoch(self, fetcher: Any) -> None:
        """Called when an epoch's iterator is about to be made."""

    @abstractmethod
    def is_in_step(self) -> bool:
        """Return True if a step has been started and not completed."""

    @abstractmethod
    def after_step(self) -> None:
        """Called when a step's validation and schedulers are done, before the Trainer looks whether to stop."""

    @abstractmethod
    def after_epoch(self) -> None:
        """Called when an epoch's validation, callbacks and schedulers are done."""

    @abstractmethod
    def after_run(self) -> None:
        """Called when the training is done, also if nothing was left to train."""


def install(trainer: Trainer, hooks: FitHooks) -> Callable[[], None]:
    """Let a Trainer call the hooks; return a function that removes them."""
    fit, epoch, signals = trainer.fit_loop, trainer.fit_loop.epoch_loop, trainer._signal_connector  # noqa: SLF001 - so below

    def start_epoch(inner: Callable[..., Any], fetcher: Any) -> None:
        hooks.before_epoch(fetcher)
        inner(fetcher)

    def end_batch(inner: Callable[..., Any], fetcher: Any) -> None:
        if not hooks.is_in_step():  # the Trainer only found that the last batch before a resume had its validation
            epoch._skip_next_val = False  # noqa: SLF001
            return
        inner(fetcher)
        if not epoch._should_accumulate():  # noqa: SLF001
            hooks.after_step()

    def end_epoch(inner: Callable[..., Any]) -> None:
        fit._restarting = False  # noqa: SLF001 - else the schedulers that follow a metric would not be updated
        inner()
        hooks.after_epoch()

    def run(inner: Callable[..., Any]) -> None:
        inner()
        hooks.after_run()

    wrappers: list[tuple[Any, str, Callable[..., Any]]] = [
        (fit, "run", run),
        (epoch, "on_run_start", start_epoch),
        (epoch, "on_advance_end", end_batch),
        (fit, "on_advance_end", end_epoch),
        (signals, "_sigterm_notifier_fn", lambda *_: None),  # it would end this rank alone
    ]
    for obj, name, wrapper in wrappers:
        inner = getattr(obj, name)
        setattr(obj, name, functools.wraps(inner)(functools.partial(wrapper, inner)))

    def uninstall() -> None:
        for obj, name, _ in wrappers:
            vars(obj).pop(name, None)

    return uninstall


def why_unsupported(trainer: Trainer) -> str | None:
    """Return what in the Trainer rules out an exact resume; None if there is nothing."""
    if type(trainer.strategy) not in (SingleDeviceStrategy, DDPStrategy):
        return f"the strategy {type(trainer.strategy).__name__}"
    if trainer.reload_dataloaders_every_n_epochs:
        return "reload_dataloaders_every_n_epochs"
    schedulers = (one for one in trainer.callbacks if isinstance(one, GradientAccumulationScheduler))
    if any(one.going_to_accumulate_grad_batches() for one in schedulers):
        return "a GradientAccumulationScheduler"
    return None


def limits_of(trainer: Trainer) -> tuple[int, int]:
    """Return the numbers of optimizer steps in the run and in an epoch.

    Raises:
        ValueError: the loader has no length, or the training step draws its batches itself.
    """
    num_batches = trainer.num_training_batches
    if math.isinf(num_batches) or type(trainer.fit_loop._data_fetcher) is not _PrefetchDataFetcher:  # noqa: SLF001
        raise ValueError("DistckptCallback cannot resume in data without a length, or in a dataloader_iter")
    epoch_length = math.ceil(num_batches / trainer.accumulate_grad_batches)
    limits = [sys.maxsize]
    if trainer.fit_loop.max_epochs is not None and trainer.fit_loop.max_epochs >= 0:
        limits.append(trainer.fit_loop.max_epochs * epoch_length)
    if trainer.max_steps >= 0 and trainer.lightning_module.automatic_optimization:
        limits.append(trainer.max_steps)
    return min(limits), epoch_length


def loader_of(trainer: Trainer) -> Any:
    """Return the loaders that the Trainer draws from."""
    combined = trainer.fit_loop._combined_loader  # noqa: SLF001
    return None if combined is None else combined.flattened


def skip_batches(trainer: Trainer, fetcher: Any) -> None:
    """Draw and drop the batches of the epoch that are trained, unless the loaders restore their positions."""
    loaders = loader_of(trainer)
    if all(hasattr(one, "state_dict") and hasattr(one, "load_state_dict") for one in loaders):
        return
    for _ in range(trainer.fit_loop.epoch_loop.batch_progress.current.ready):
        next(fetcher)
    fetcher.fetched = 0  # the epoch's start adds them


def stop(trainer: Trainer) -> None:
    """Let the Trainer stop after this batch, whatever `min_epochs` and `min_steps` are."""
    trainer.should_stop = True
    trainer.fit_loop.min_epochs = 0
    trainer.fit_loop.epoch_loop.min_steps = 0


def objects_of(trainer: Trainer) -> dict[str, Any]:
    """Return the objects that the Trainer trains."""
    objects = {
        "model": trainer.model,
        "optimizers": list(trainer.optimizers),
        "schedulers": [config.scheduler for config in trainer.lr_scheduler_configs],
    }
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return objects if scaler is None else objects | {"scaler": scaler}


class FitProgress:
    """The counters of a Trainer's loops, and the states of its callbacks and data module, as an object to save.

    Attributes:
        trainer: the Trainer; None until it is known.
        loaded: the state that was loaded; None for none.
    """

    def __init__(self) -> None:
        self.trainer: Trainer | None = None
        self.loaded: Mapping[str, Any] | None = None

    def state_dict(self) -> dict[str, Any]:
        """Return the state. Rank-local."""
        trainer = self.trainer
        if trainer is None:
            return dict(self.loaded or {})
        hooked: dict[str, Any] = {}
        trainer.lightning_module.on_save_checkpoint(hooked)
        data = trainer.datamodule
        return {
            "fit_loop": deepcopy(trainer.fit_loop.state_dict()),
            "callbacks": {one.state_key: deepcopy(one.state_dict()) for one in trainer.callbacks if one.state_dict()},
            "module": hooked,
            "datamodule": {} if data is None else data.state_dict(),
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Keep a state. Rank-local."""
        self.loaded = state_dict

    def apply(self, *, is_in_epoch: bool) -> None:
        """Give the loaded state to the Trainer. Rank-local.

        Args:
            is_in_epoch: whether an epoch is under way. If not, the next one starts, even if `max_steps` limits the run:
                then the Trainer would take the last epoch for unfinished.
        """
        trainer, state = self.trainer, self.loaded
        if trainer is None or state is None:
            return
        trainer.fit_loop.load_state_dict(dict(state["fit_loop"]))
        if not is_in_epoch:
            trainer.fit_loop._restarting = False  # noqa: SLF001
            trainer.fit_loop.epoch_loop.restarting = False
        for one in trainer.callbacks:
            if one.state_key in state["callbacks"]:
                one.load_state_dict(deepcopy(state["callbacks"][one.state_key]))
        trainer.lightning_module.on_load_checkpoint(dict(state["module"]))
        if trainer.datamodule is not None and state["datamodule"]:
            trainer.datamodule.load_state_dict(state["datamodule"])
