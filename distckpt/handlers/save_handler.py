"""What a Checkpoint hands its states to.

Owns the contract of a save handler, and how one is called. Layer L5.
"""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

from ignite.handlers.checkpoint import BaseSaveHandler as _IgniteSaveHandler

__all__ = ["BaseSaveHandler", "hand_over"]

_NUM_ARGUMENTS = 3


class BaseSaveHandler(ABC):
    """Base class for save handlers.

    A save handler is called on every rank, in the same order; a handler that writes on one rank looks at the rank
    itself. What it raises on one rank is raised on all.

    Handlers derived from ignite's class of the same name count as such too.

    Example:
        >>> class InMemory(BaseSaveHandler):
        ...     def __init__(self):
        ...         self.files = {}
        ...
        ...     def __call__(self, checkpoint, filename, metadata=None):
        ...         self.files[filename] = checkpoint
        ...
        ...     def remove(self, filename):
        ...         del self.files[filename]
    """

    @abstractmethod
    def __call__(self, checkpoint: Mapping[str, Any], filename: str, metadata: Mapping[str, Any] | None = None) -> None:
        """Save `checkpoint` as `filename`.

        Args:
            checkpoint: the states.
            filename: the checkpoint's name.
            metadata: ``basename`` (prefix and name), ``score_name`` and ``priority`` (higher is better).
        """

    @abstractmethod
    def remove(self, filename: str) -> None:
        """Remove the checkpoint `filename`.

        Args:
            filename: the checkpoint's name.
        """


BaseSaveHandler.register(_IgniteSaveHandler)  # type: ignore[type-abstract]  # mypy 4717: an ABC may be registered


def hand_over(
    handler: Callable[..., Any], checkpoint: Mapping[str, Any], filename: str, metadata: Mapping[str, Any]
) -> None:
    """Call `handler` with as many arguments as its signature takes: three, or two."""
    if _takes_three(handler):
        handler(checkpoint, filename, metadata)
    else:
        handler(checkpoint, filename)


def _takes_three(handler: Callable[..., Any]) -> bool:
    try:
        signature = inspect.signature(handler)
    except (TypeError, ValueError):  # written in C, and silent about it
        return True
    try:
        signature.bind(*range(_NUM_ARGUMENTS))
    except TypeError:
        return False
    return True
