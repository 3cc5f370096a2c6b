"""All access to private names of transformers' Trainer.

The Trainer gives a callback neither the loss nor an exception, and calls none of its methods after the logs and
evaluations of a step. So methods of one Trainer object are wrapped for one call of ``train()``.
``tests/integrations/test_trainer_hooks.py`` checks each name and statement of transformers that this module relies on.
"""

import dataclasses
import functools
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

from transformers import Trainer, TrainerState
from transformers.trainer_callback import ExportableState


class TrainerHooks(ABC):
    """What a Trainer calls while it trains, on all ranks."""

    @abstractmethod
    def before_epoch(self) -> bool:
        """Called before an epoch's iterator is made; return False to train no more."""

    @abstractmethod
    def after_batch(self, loss: Any) -> None:
        """Called with the loss of each batch, before the optimizer's step."""

    @abstractmethod
    def after_step(self) -> None:
        """Called when a step's logs, evaluation and scheduler are done, before the Trainer looks whether to stop."""

    @abstractmethod
    def after_epoch(self) -> None:
        """Called when an epoch's logs and evaluation are done."""

    @abstractmethod
    def on_error(self, error: BaseException) -> None:
        """Called with an exception that leaves ``train()``."""


def install(trainer: Trainer, hooks: TrainerHooks) -> None:
    """Let a Trainer call the hooks in its next ``train()``, and keep it from loading anything itself."""
    step: dict[str, int] = {}

    def run(inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        try:
            return inner(*args, **kwargs)
        except BaseException as error:
            hooks.on_error(error)
            raise
        finally:
            for name in wrappers:
                vars(trainer).pop(name, None)

    def run_epoch(inner: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        if not hooks.before_epoch():
            trainer.control.should_training_stop = True
            return
        step["last"] = trainer.state.global_step
        inner(*args, **kwargs)
        hooks.after_epoch()

    def train_batch(inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        loss = inner(*args, **kwargs)
        hooks.after_batch(loss)
        return loss

    def log_and_evaluate(inner: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        inner(*args, **kwargs)
        if trainer.state.global_step != step["last"]:  # else it is the epoch's own call
            step["last"] = trainer.state.global_step
            hooks.after_step()

    wrappers: dict[str, Callable[..., Any]] = {
        "_inner_training_loop": run,
        "_run_epoch": run_epoch,
        "training_step": train_batch,
        "_maybe_log_save_evaluate": log_and_evaluate,
        "_load_from_checkpoint": lambda *_args, **_kwargs: None,
    }
    for name, wrapper in wrappers.items():
        inner = getattr(trainer, name)
        setattr(trainer, name, functools.wraps(inner)(functools.partial(wrapper, inner)))


def why_unsupported(trainer: Trainer) -> str | None:
    """Return which setting of the Trainer rules out an exact resume; None if there is none."""
    args = trainer.args
    problems = {
        "DeepSpeed": trainer.is_deepspeed_enabled,
        "FSDP": trainer.is_fsdp_enabled,
        "auto_find_batch_size": args.auto_find_batch_size,
        "ignore_data_skip": args.ignore_data_skip,
    }
    return next((name for name, is_set in problems.items() if is_set), None)


def num_steps_in_epoch(trainer: Trainer, loader: Any) -> int:
    """Return the number of optimizer steps in an epoch, as the Trainer counts them."""
    _, num_steps, *_ = trainer.set_initial_training_values(trainer.args, loader)
    return int(num_steps)


def objects_of(trainer: Trainer) -> dict[str, Any]:
    """Return the objects that the Trainer trains, without accelerate's wrappers."""
    objects = {
        "model": trainer.model_wrapped,
        "optimizer": getattr(trainer.optimizer, "optimizer", trainer.optimizer),
        "scheduler": trainer.lr_scheduler,
    }
    scaler = trainer.accelerator.scaler
    return objects if scaler is None else objects | {"scaler": scaler}


class TrainerProgress:
    """A Trainer's ``TrainerState``, as an object to save.

    Attributes:
        loaded: the state that was loaded; None for none. The Trainer takes it over when its ``train()`` starts.
    """

    distckpt_saves_alone = True

    def __init__(self) -> None:
        self.trainer: Trainer | None = None
        self.loaded: Mapping[str, Any] | None = None

    def distckpt_consolidate(self, to: int) -> dict[str, Any]:
        """Collective. Add up the ranks' counts of floating-point operations, and return the state."""
        if self.trainer is not None:
            self.trainer.store_flos()
        return self.state_dict()

    def state_dict(self) -> dict[str, Any]:
        """Return the state, with those of the callbacks, as plain values. Rank-local."""
        trainer = self.trainer
        if trainer is None:
            return dict(self.loaded or {})
        state: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(trainer.state)))
        state["stateful_callbacks"] |= _callback_states(trainer)
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Keep a state. Rank-local."""
        self.loaded = dict(state_dict)

    def write(self, path: str) -> None:
        """Write the loaded state as the Trainer's own checkpoints hold it."""
        TrainerState(**(self.loaded or {})).save_to_json(path)


def _callback_states(trainer: Trainer) -> dict[str, Any]:
    states: dict[str, Any] = {}
    for one in [*trainer.callback_handler.callbacks, trainer.control]:
        if isinstance(one, ExportableState):
            states.setdefault(type(one).__name__, []).append(one.state())
    return {name: found[0] if len(found) == 1 else found for name, found in states.items()}
