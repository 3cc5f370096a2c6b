"""A training with Hugging Face's Trainer, and what may happen in it."""

import math
import os
import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ignite.engine import Events
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments, set_seed

from distckpt import stop_reason
from distckpt.integrations.transformers import DistckptCallback
from tests.integrations.best import OwnError, keep_best
from tests.integrations.digests import digests_of

NUM_TOKENS = 20
NO_TOKENS = {"bos_token_id": 0, "eos_token_id": 0}


class Texts(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Sequences of tokens."""

    def __init__(self, num: int) -> None:
        self._num = num

    def __len__(self) -> int:
        """Return the number of sequences."""
        return self._num

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """Return a sequence."""
        tokens = torch.randint(0, NUM_TOKENS, (4,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": tokens, "labels": tokens}


class Noisy(Trainer):  # type: ignore[misc]  # checked without transformers
    """A Trainer to which something happens in a step."""

    def happens(self, what: str, step: int) -> None:
        """Let it happen in this rank's step."""
        self.what, self.at = what, step

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        """Return the loss, with noise from all generators."""
        loss = super().compute_loss(*args, **kwargs)
        if not self.model.training:
            return loss
        noise = random.random() + float(np.random.rand())  # noqa: NPY002 - the global generators are tested
        is_due = self.state.global_step + 1 == getattr(self, "at", None)
        if is_due and self.what == "signal":
            os.kill(os.getpid(), signal.SIGTERM)
        if is_due and self.what == "error":
            raise OwnError("own")
        return loss * (math.nan if is_due and self.what == "nan" else 1.0 + noise)


def train(
    folder: Path,
    rank: int,
    tell_ready: Callable[[], object],
    *,
    happens: tuple[int, str, int] | None = None,
    save_every: int | None = 2,
    size: int = 26,
    accumulation: int = 2,
    is_seedable: bool = True,
    **settings: Any,
) -> dict[str, Any]:
    """Train, or go on; return what the run left.

    Args:
        folder: for the checkpoints.
        rank: this rank.
        tell_ready: called when the first step begins.
        happens: rank, what and step; of "end" the epoch.
        save_every: as DistckptCallback's.
        size: number of sequences.
        accumulation: batches in a step.
        is_seedable: whether accelerate gives the sampler a seed of its own.
        settings: for TrainingArguments.
    """
    set_seed(1)
    config = GPT2Config(vocab_size=NUM_TOKENS, n_positions=4, n_embd=8, n_layer=1, n_head=1, **NO_TOKENS)
    callback = DistckptCallback(folder / "checkpoints", save_every)
    callback.loop.add_event_handler(Events.ITERATION_STARTED(once=1), tell_ready)
    callback.loop.add_event_handler(Events.EPOCH_STARTED, tell_ready)
    is_due = happens is not None and happens[0] == rank
    arguments = TrainingArguments(
        str(folder / "out"),
        **{
            "use_cpu": True,
            "save_strategy": "no",
            "report_to": [],
            "disable_tqdm": True,
            "num_train_epochs": 3,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": accumulation,
            "logging_steps": 1,
            "lr_scheduler_type": "cosine",
            "learning_rate": 1e-2,
            "accelerator_config": {"use_seedable_sampler": is_seedable},
            **settings,
        },
    )
    model = GPT2LMHeadModel(config)
    trainer = Noisy(model, arguments, train_dataset=Texts(size), eval_dataset=Texts(2), callbacks=[callback])
    if "eval_strategy" in settings:
        keep_best(callback.loop, {"model": model}, folder, "eval_loss", happens if is_due else None)
    if happens is not None and is_due:
        trainer.happens(*happens[1:])
    error = None
    try:
        trainer.train(resume_from_checkpoint=callback.resume(trainer))
    except Exception as caught:  # noqa: BLE001 - reported
        error = caught
    return {
        **digests_of([model.state_dict(), trainer.optimizer.state_dict(), trainer.lr_scheduler.state_dict()]),
        "log": [{key: value for key, value in one.items() if is_repeated(key)} for one in trainer.state.log_history],
        "steps": trainer.state.global_step,
        "iteration": callback.loop.state.iteration,
        "epoch": callback.loop.state.epoch,
        "flos": trainer.state.total_flos,
        "reason": stop_reason(callback.loop),
        "error": None if error is None else f"{type(error).__name__}: {error}",
        "best": sorted(path.name for path in (folder / "best").glob("*.pt")),
        "files": sorted(path.name for path in (folder / "checkpoints").glob("*.pt")),
        "is_signal_default": signal.getsignal(signal.SIGTERM) == signal.SIG_DFL,
    }


def is_repeated(key: str) -> bool:
    """Return True for an entry of the log that does not depend on time, nor on where ``train()`` was called."""
    return key != "train_loss" and not key.endswith(("runtime", "_per_second"))
