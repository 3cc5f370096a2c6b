"""What a Checkpoint hands its states to.

Owns the contract of a save handler, and how one is called.
"""

import inspect
from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

from ignite.handlers.checkpoint import BaseSaveHandler as _IgniteSaveHandler

__all__ = ["BaseSaveHandler", "hand_over", "refuse_overrides"]

_NUM_ARGUMENTS = 3


class BaseSaveHandler(_IgniteSaveHandler):
    """Base class for save handlers.

    A save handler is called on every rank, in the same order; a handler that writes on one rank looks at the rank
    itself. What it raises on one rank is raised on all.

    A handler may keep several names in one place, a fixed key for one. Nobody but the handler knows which, so
    :class:`~distckpt.Checkpoint` calls ``remove`` for an evicted checkpoint before it saves the new one, as ignite
    does. A :class:`~distckpt.DiskSaver` and its subclasses save first, and remove afterwards.

    Each library's handlers count as save handlers of the other: those derived from ignite's class of the same name
    are instances of this class, and this class derives from ignite's.

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

    @classmethod
    def __subclasshook__(cls, candidate: type) -> Any:
        # register() would refuse this as a circle: this class derives from ignite's.
        return True if cls is BaseSaveHandler and _IgniteSaveHandler in candidate.__mro__ else NotImplemented


def refuse_overrides(cls: type, instead: Mapping[str, str]) -> None:
    """Refuse a subclass that overrides a method of ignite's which this library never calls.

    Args:
        cls: the subclass, from its base's ``__init_subclass__``.
        instead: by the method's name, what to do instead.

    Raises:
        TypeError: the class, or a class that it derives from, has such a method.
    """
    for name, advice in instead.items():
        if hasattr(cls, name):
            msg = f"{cls.__qualname__} overrides `{name}`, which ignite calls and distckpt does not. {advice}"
            raise TypeError(msg)


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
