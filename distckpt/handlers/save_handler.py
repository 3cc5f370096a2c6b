"""Save handlers: the base class, and what a Checkpoint may ask of any of them."""

import inspect
import os
from abc import abstractmethod
from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Literal, Protocol, cast

from ignite.handlers.checkpoint import BaseSaveHandler as _IgniteSaveHandler
from ignite.handlers.checkpoint import DiskSaver as _IgniteDiskSaver

from distckpt.backends.base import Backend
from distckpt.coordination.phases import SyncPoint
from distckpt.policy.decision import RemovalOrder
from distckpt.ptformat.manifest import Manifest
from distckpt.saving.rank_writer import RankWriter
from distckpt.saving.writer_group import WriterGroup, WriterSearch
from distckpt.storage.base import Storage

WhenBusy = Literal["wait", "skip"]


class BaseSaveHandler(_IgniteSaveHandler):
    """Base class of save handlers.

    A Checkpoint calls its save handler on every rank, in the same order. A handler that writes on one rank checks the
    rank itself. An error on one rank is raised on all.

    A handler may store several names in one place, such as a fixed key. Only the handler knows, so a
    :class:`~distckpt.Checkpoint` calls ``remove`` for evicted checkpoints before it saves the new one, as ignite does.
    :class:`~distckpt.DiskSaver` and its subclasses save first, and remove afterwards.

    The handlers of ignite are instances of this class, and this class derives from ignite's.

    Attributes:
        storage: the place to which a Checkpoint writes files itself, with manifests, in the background and from several
            ranks. A handler with a storage is a :class:`StorageSaver`. None: the Checkpoint only calls this handler,
            and ``remove``.

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

    storage: Storage | None = None

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
        """Remove the checkpoint `filename`."""

    @classmethod
    def __subclasshook__(cls, candidate: type) -> Any:
        # register() would refuse a circle: this class derives from ignite's.
        return True if cls is BaseSaveHandler and _IgniteSaveHandler in candidate.__mro__ else NotImplemented


class StorageSaver(Protocol):
    """A save handler with a storage, as a Checkpoint uses it. :class:`~distckpt.DiskSaver` is one."""

    save_on_rank: int
    background: bool
    when_busy: WhenBusy

    @property
    def storage(self) -> Storage:
        """The storage."""

    @property
    def object_id(self) -> str | None:
        """The id under which ranks report that the handler's construction failed; None if they cannot."""

    @property
    def removal_order(self) -> RemovalOrder:
        """When evicted files are removed."""

    @property
    def saves_in_steps(self) -> bool:
        """Whether a save is a :class:`~distckpt.saving.pending_save.PendingSave`."""

    @property
    def writes_on_one_rank(self) -> bool:
        """Whether only the coordinator creates files; other ranks may write parts of them."""

    @property
    def writes_one_file(self) -> bool:
        """Whether a save writes the named file and no other."""

    def knows_writers(self, backend: Backend) -> bool:
        """Rank-local. Return True if this rank knows which ranks write."""

    def find_group(
        self, backend: Backend, sync_point: Callable[[str], SyncPoint], *, is_known: bool, timeout_s: float | None
    ) -> WriterGroup:
        """Return the ranks that write. Collective unless `is_known`."""

    def shard_writers(self, backend: Backend, *, timeout_s: float | None) -> WriterSearch:
        """Rank-local. Return what finds the ranks that write sharded tensors."""

    def make_writer(
        self, backend: Backend, filename: str, manifest: Manifest, group: WriterGroup, key: str = ""
    ) -> RankWriter:
        """Rank-local. Return this rank's writer of a save in steps."""

    def save_with_manifest(
        self, checkpoint: Any, filename: str, manifest: Manifest, key: str, metadata: Mapping[str, Any]
    ) -> None:
        """Rank-local. Save a file with its manifest, and return when it is durable."""

    def refuse_last_loadable(self, filename: str, kept: Collection[str], written: str | None = None) -> None:
        """Rank-local. Raise ``StillNeeded`` if none of the kept files can be loaded, but `filename` can. Any thread."""

    def keeping(self, files: frozenset[tuple[int, int]]) -> AbstractContextManager[None]:
        """Rank-local. Keep ``remove`` from removing the files with these devices and inodes."""


def storage_saver(handler: object) -> StorageSaver | None:
    """Return the handler if a Checkpoint may write into its storage; None if it can only be called."""
    # Ask the class: a program's own handler may have an attribute of that name, and a mock or a proxy has every one.
    has_storage = hasattr(type(handler), "make_writer") and getattr(handler, "storage", None) is not None
    return cast("StorageSaver", handler) if has_storage else None


def directory_of(handler: Any) -> Path | None:
    """Return the local directory of a DiskSaver, ignite's or distckpt's; None for other handlers."""
    return Path(handler.dirname) if isinstance(handler, _IgniteDiskSaver) else None


def removal_order_of(handler: object) -> RemovalOrder:
    """Return when a Checkpoint with this save handler removes evicted files."""
    saver = storage_saver(handler)
    if saver is not None:
        return saver.removal_order
    if isinstance(handler, _IgniteDiskSaver):
        is_own = runs_methods_of(handler, _IgniteDiskSaver, "__call__", "_save_func", "remove")
        return RemovalOrder.AFTER if is_own else RemovalOrder.AFTER_KEEPING
    return RemovalOrder.BEFORE if isinstance(handler, BaseSaveHandler) else RemovalOrder.NEVER


def replaces_file(handler: object) -> bool:
    """Return True if a save replaces a file of its name; False if ``remove`` has to come first, as in ignite.

    An atomic replacement is never preceded by a removal: if the save failed, no checkpoint would be left.
    """
    return storage_saver(handler) is not None or removal_order_of(handler) != RemovalOrder.BEFORE


def is_same_directory(one: object, other: object) -> bool:
    """Return True if two save handlers write into the same local directory."""
    first, second = directory_of(one), directory_of(other)
    return first is not None and second is not None and os.path.realpath(first) == os.path.realpath(second)


def runs_methods_of(handler: object, cls: type, *methods: str) -> bool:
    """Return True if `handler` runs the methods of `cls`, overridden neither by a subclass nor on the instance."""
    found = (getattr(type(handler) if name == "__call__" else handler, name, None) for name in methods)
    return all(getattr(one, "__func__", one) is getattr(cls, name) for name, one in zip(methods, found, strict=True))


def call_handler(
    handler: Callable[..., Any], checkpoint: Mapping[str, Any], filename: str, metadata: Mapping[str, Any]
) -> None:
    """Call `handler` with as many arguments as its signature takes: three, or two."""
    arguments = (checkpoint, filename, metadata)
    handler(*(arguments if _takes(handler, arguments) else arguments[:2]))


def _takes(handler: Callable[..., Any], arguments: tuple[Any, ...]) -> bool:
    try:
        signature = inspect.signature(handler)
    except (TypeError, ValueError):  # written in C, without a signature
        return True
    try:
        signature.bind(*arguments)
    except TypeError:
        return False
    return True
