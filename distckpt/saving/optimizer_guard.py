"""Fences: what an optimizer is about to change in place waits until it is copied.

Owns the hook into ``torch.optim``. Must not know what is copied, nor where to.

Only what changes in no other way than by an optimizer's step may be copied behind a fence: parameters, and what the
optimizer keeps for them. Buffers change in the forward pass, averages of weights in somebody's handler: they are copied
before training goes on.
"""

import contextlib
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

__all__ = ["OptimizerStepGuard", "has_step_hook", "wait_for_deferred_copies"]

_LOCK = threading.Lock()
_UP: "list[OptimizerStepGuard]" = []
_HOOKED: list[bool] = []


class OptimizerStepGuard:
    """Keeps every optimizer of the process from its next step while something is copied.

    Args:
        wait: returns when it is copied. What it raises is somebody else's to tell.
    """

    def __init__(self, wait: Callable[[], None]) -> None:
        self._wait = wait
        with _LOCK:
            if not _HOOKED:  # once, and for good: torch goes through its hooks while they are called
                register_optimizer_step_pre_hook(_hold)
                _HOOKED.append(True)
            _UP.append(self)

    def hold(self) -> None:
        """Wait, and take it down."""
        with contextlib.suppress(Exception):
            self._wait()
        self.take_down()

    def take_down(self) -> None:
        """Let optimizers step. Any thread; nothing a second time."""
        with _LOCK, contextlib.suppress(ValueError):
            _UP.remove(self)


def wait_for_deferred_copies() -> None:
    """Wait until nothing is copied late any more: before anything else than an optimizer changes parameters."""
    if _UP:
        for fence in tuple(_UP):
            fence.hold()


def _hold(*_: Any) -> None:
    wait_for_deferred_copies()


def has_step_hook(optimizer: torch.optim.Optimizer) -> bool:
    """Tell whether each step of an optimizer comes by the hook: not where a graph of the device's may repeat it.

    Optimizers that refuse to be captured unless they are told to (Adam and its like have ``capturable``) are known; of
    others, as SGD, nobody knows.
    """
    return all(group.get("capturable") is False for group in optimizer.param_groups)
