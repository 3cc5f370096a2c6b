"""The save handler for directories: which ranks write, and the checks of the directory."""

import contextlib
import errno
import functools
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from ignite.handlers.checkpoint import DiskSaver as _IgniteDiskSaver

from distckpt._threads import get_num_threads
from distckpt.backends.base import Backend
from distckpt.backends.detect import current
from distckpt.coordination.phases import SyncPoint, post_failure
from distckpt.handlers.arguments import check_choice, check_rank
from distckpt.handlers.compat import DISK_SAVER_OVERRIDES, refuse_overrides
from distckpt.handlers.run_record import records_by_default
from distckpt.handlers.save_handler import BaseSaveHandler, WhenBusy, runs_methods_of
from distckpt.policy.decision import RemovalOrder
from distckpt.policy.naming import check_name
from distckpt.ptformat.loadable import RefusedObject, locate_refused
from distckpt.ptformat.manifest import Manifest
from distckpt.ptformat.reader import find_refused_names, is_loadable
from distckpt.ptformat.torch_format import check_save_options, uses_default_format
from distckpt.saving.api import describe_job, warn_of_refused
from distckpt.saving.plain_state import plain_state
from distckpt.saving.protocol import StillNeeded
from distckpt.saving.rank_writer import RankWriter, write_file
from distckpt.saving.snapshot import WHOLE
from distckpt.saving.staging import HostMemory, thread_memory
from distckpt.saving.writer_group import WriterCache, WriterGroup, WriterSearch
from distckpt.storage.local import LocalFile, LocalStorage, make_directory
from distckpt.storage.written_files import identity_of

ShareWrite = Literal["node", "world"] | None
_XLA_OPTIONS = ("master_only", "global_master")


class DiskSaver(BaseSaveHandler):
    """Handler that saves a checkpoint on a disk, whole and durable.

    The file is written under a temporary name in the same directory, synced and renamed, and the directory is synced
    before the call returns. Only ``save_on_rank`` creates, writes and removes files; other ranks return at once.
    Neither the constructor nor a call issues collectives: :class:`~distckpt.Checkpoint` makes the ranks agree.

    Args:
        dirname: the directory; ``~`` is expanded.
        atomic: whether to write under a temporary name first. False only for file systems that cannot rename: a failed
            save then leaves a partial file.
        create_dir: whether to create the directory if it is missing.
        require_empty: whether to refuse a directory that holds any ``*.pt``.
        save_on_rank: the rank that writes.
        background: whether a :class:`~distckpt.Checkpoint` that saves here returns as soon as the state is copied to
            host memory; the file is then written while training continues. The save is complete, and in the handler's
            history, a few iterations later, when all ranks have voted that it is durable; at the latest at the end of
            the run, or after :meth:`~distckpt.Checkpoint.wait_until_finished`. An error is raised then, on all ranks,
            and earlier checkpoints stay as they are. All ranks have to run the same number of iterations.
        when_busy: what a Checkpoint does if its last save is still pending: ``"wait"`` for it, or ``"skip"`` the new
            one.
        overlap_copy: whether background saves copy parameters and optimizer states that are on an accelerator while the
            next step computes. The optimizer's step waits for the copy, and so do distckpt's own loads. Set it to
            False if other code changes parameters in place before that step, such as a handler that swaps averaged
            weights, or torch's ``load_state_dict``.
        own_memory: whether this saver has host memory of its own. Otherwise the savers of the process share the memory
            for one file, and wait for each other.
        share_write: ranks of the same ``"node"``, or of the whole ``"world"``, that see the same directory (by a probe
            file) write the file together. Each copies and writes a range of the replicas: the parameters of modules in
            `to_save` that are wrapped in DistributedDataParallel, and their optimizer's state. Everything else comes
            from ``save_on_rank``. If the ranks' states have different layouts, ``save_on_rank`` writes all, with a
            warning. None: ``save_on_rank`` alone writes.
        check_replicas: whether to compare checksums of the replicas before each save. A difference is an error on all
            ranks that names the tensor.
        record_events: whether a :class:`~distckpt.Checkpoint` that saves here records its runs' events in the
            directory, in the hidden file ``.distckpt-events.jsonl``, for ``distckpt plot``. None for
            ``DISTCKPT_RECORD_EVENTS``, or False if it is not set. If False, the directory holds checkpoints alone.
        kwargs: keyword arguments of ``torch.save``; in an XLA job also those of ``xm.save``. ``master_only=False``:
            every replica writes, into its own `dirname`. ``global_master=False``: the first replica of each machine
            writes, for disks that the machines do not share.

    A call by a user saves in the foreground, from one rank. So does a Checkpoint with a subclass that overrides
    ``__call__`` or ``_save_func``, whatever `background` and `share_write` are.

    Attributes:
        dirname: the directory, as a path.
        storage: the directory, as a storage.

    The other attributes are the arguments of the same names.

    Raises:
        TypeError: `dirname` is neither str nor Path, or `save_on_rank` is not an int.
        ValueError: the directory is missing or not empty, on every rank that sees it; or an argument has a wrong value.
        OSError: the directory cannot be created.

    Example:
        >>> import tempfile, torch
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     saver = DiskSaver(folder)
        ...     saver({"a": torch.ones(2)}, "a.pt")
        ...     torch.load(saver.dirname / "a.pt", weights_only=True)
        {'a': tensor([1., 1.])}
    """

    _deferred_devices: ClassVar[tuple[str, ...]] = ("cuda",)  # on a CPU a deferred copy slows the next step down

    def __init__(
        self,
        dirname: str | os.PathLike[str],
        atomic: bool = True,
        create_dir: bool = True,
        require_empty: bool = True,
        save_on_rank: int = 0,
        *,
        background: bool = False,
        when_busy: WhenBusy = "wait",
        overlap_copy: bool = True,
        own_memory: bool = False,
        share_write: ShareWrite = None,
        check_replicas: bool = False,
        record_events: bool | None = None,
        **kwargs: Any,
    ) -> None:
        if not isinstance(dirname, str | os.PathLike):
            raise TypeError(f"Argument dirname should be a string or Path object, but given {type(dirname)}")
        check_choice("when_busy", when_busy, ("wait", "skip"))
        check_choice("share_write", share_write, (None, "node", "world"))
        self.dirname = Path(dirname).expanduser()
        self.save_on_rank = check_rank(save_on_rank)
        self.background = bool(background)
        self.when_busy = when_busy
        self.share_write = share_write
        self.check_replicas = bool(check_replicas)
        self.record_events = records_by_default() if record_events is None else bool(record_events)
        self.kwargs = kwargs
        self.overlap_copy = bool(overlap_copy)
        self._atomic = bool(atomic)
        self._memory = HostMemory() if own_memory else None
        self._writers, self._shard_writers = WriterCache(), WriterCache()
        self._unloadable: set[str] = set()  # files written here that loading refuses
        self._kept = frozenset[tuple[int, int]]()
        self._key = ""
        self._manifest: Manifest | None = None
        backend = current()
        # An error on some ranks only is reported to the others at the handler's first event.
        self._object_id = backend.next_object_id(type(self).__name__)
        try:
            if self._writes_on(backend):
                self._check_and_setup(self.dirname, bool(create_dir), bool(require_empty))
            elif self.dirname.exists() or not create_dir:
                # The coordinator creates a missing directory. This rank may see another node's disk, without it.
                DiskSaver._check_and_setup(self.dirname, create_dir=False, require_empty=bool(require_empty))
        except (ValueError, OSError) as error:
            if self._object_id is not None:
                post_failure(backend, self._object_id, error)
            raise

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        refuse_overrides(cls, DISK_SAVER_OVERRIDES)

    @staticmethod
    def _check_and_setup(dirname: Path, create_dir: bool, require_empty: bool) -> None:
        """Create and check the directory. The constructor calls it on the coordinator, as ignite's does."""
        if create_dir:
            make_directory(dirname)
        if not dirname.exists():
            raise ValueError(f"Directory path '{dirname}' is not found")
        if not dirname.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(dirname))
        if require_empty:
            matched = sorted(path.name for path in dirname.iterdir() if path.name.endswith(".pt"))
            if matched:
                raise ValueError(
                    f"Files {matched} with extension '.pt' are already present in the directory {dirname}. "
                    "If you want to use this directory anyway, pass `require_empty=False`."
                )

    @property
    def storage(self) -> LocalStorage:  # type: ignore[override]  # `dirname` may be assigned
        """The directory, as a storage."""
        return LocalStorage(self.dirname, atomic=self._atomic)

    @property
    def object_id(self) -> str | None:
        """The id under which ranks report that the construction failed; None if the backend has no place for it."""
        return self._object_id

    def __call__(self, checkpoint: Mapping[str, Any], filename: str, metadata: Mapping[str, Any] | None = None) -> None:
        """Save `checkpoint` as `filename` on the coordinator. Rank-local; issues no collectives.

        Args:
            checkpoint: what ``torch.save`` takes.
            filename: relative to the directory; must not leave it.
            metadata: not used.

        Raises:
            TypeError: the constructor got a keyword argument that ``torch.save`` does not take; raised on every rank.
            ShardedStateError: the checkpoint holds a sharded tensor; raised on every rank that has a shard.
            ValueError: the name would leave the directory, or meets a symlink.
            SaveError: the file could not be written. An earlier file of that name is unchanged.
            CommitNotDurable: the file is in place, but may not survive a power cut.
        """
        state = plain_state(checkpoint, "the checkpoint", convert_numpy=False)
        self._save(state, filename, Manifest(**describe_job(current())))

    def save_with_manifest(
        self, checkpoint: Any, filename: str, manifest: Manifest, key: str, metadata: Mapping[str, Any]
    ) -> None:
        """Save with a manifest. A subclass that overrides ``__call__`` is called instead."""
        if runs_methods_of(self, DiskSaver, "__call__"):
            self._save(checkpoint, filename, manifest, key)
        else:
            self(checkpoint, filename, metadata)

    def _save(self, checkpoint: Mapping[str, Any], filename: str, manifest: Manifest, key: str = "") -> None:
        check_save_options(self._options())
        check_name(filename)
        if self._writes_on(current()):
            self._manifest, self._key = manifest, key
            self._unloadable.discard(filename)
            try:
                self._save_func(checkpoint, self.dirname / filename, torch.save)
            finally:
                self._manifest, self._key = None, ""

    def _save_func(
        self, checkpoint: Mapping[str, Any], path: str | os.PathLike[str], func: Callable[..., Any], rank: int = 0
    ) -> None:
        """Write `checkpoint` to `path`, whole and durable. Every save in the foreground calls it on the coordinator.

        Subclasses override it, as they do ignite's, to upload the file or to write it by another function. A `func`
        other than ``torch.save`` is called with the checkpoint, a file object (the path if `atomic` is off), and this
        handler's keyword arguments.
        """
        path = Path(path)
        is_inside = path.is_relative_to(self.dirname)
        storage = LocalStorage(self.dirname if is_inside else path.parent, atomic=self._atomic)
        name = str(path.relative_to(storage.directory))
        if func is torch.save:
            backend = current()
            write_file(
                storage,
                name,
                checkpoint,
                memory=self._staging_memory(),
                manifest=self._manifest or Manifest(**describe_job(backend)),
                options=self._options(),
                num_threads=get_num_threads(backend.world_size),
                on_refused=functools.partial(self._on_refused, name, self._key),
            )
            return
        if self._atomic:
            with storage.create(name) as new:
                with os.fdopen(os.dup(new.fd), "w+b") as file:
                    func(checkpoint, file, **self.kwargs)
                new.commit(new.num_bytes)
        else:
            func(checkpoint, path, **self.kwargs)
        with LocalFile(path) as written:
            names = find_refused_names(written)
        if names:
            self._on_refused(name, self._key, locate_refused(checkpoint, names))

    def _options(self) -> dict[str, Any]:
        is_xla = current().name == "xla"
        return {name: value for name, value in self.kwargs.items() if not is_xla or name not in _XLA_OPTIONS}

    def _staging_memory(self) -> HostMemory:
        return thread_memory() if self._memory is None else self._memory

    def _on_refused(self, filename: str, key: str, refused: Sequence[RefusedObject]) -> None:
        self._unloadable.add(filename)
        warn_of_refused(self.dirname / filename, key, refused)

    @property
    def saves_in_steps(self) -> bool:
        """Whether a Checkpoint's save is a :class:`~distckpt.saving.pending_save.PendingSave`."""
        # Keyword arguments that choose another pickler or format need torch's own writer, which has no steps. A
        # subclass that removes files in its own way may have to do so first, which only a save without steps can.
        is_own = self.removal_order == RemovalOrder.AFTER
        is_wanted = self.background or self.share_write is not None or self.check_replicas or is_own
        return is_wanted and uses_default_format(self.kwargs) and self.writes_one_file

    @property
    def writes_one_file(self) -> bool:
        """Whether a save writes the named file and no other: no subclass overrides how it writes."""
        return runs_methods_of(self, DiskSaver, "__call__", "_save_func")

    @property
    def writes_on_one_rank(self) -> bool:
        """Whether only ``save_on_rank`` creates files; other ranks may write parts of them."""
        return current().name != "xla" or all(self.kwargs.get(option, True) for option in _XLA_OPTIONS)

    def _writes_on(self, backend: Backend) -> bool:
        if self.writes_on_one_rank:
            return backend.rank == self.save_on_rank
        return not self.kwargs.get("master_only", True) or backend.local_rank == 0

    def _shares(self) -> bool:
        return self.share_write is not None and self.writes_on_one_rank

    def knows_writers(self, backend: Backend) -> bool:
        """Rank-local. Return True if this rank knows which ranks write."""
        return not self._shares() or self._sharing_ranks(backend, None).is_known()

    def find_group(
        self, backend: Backend, sync_point: Callable[[str], SyncPoint], *, is_known: bool, timeout_s: float | None
    ) -> WriterGroup:
        """Return the ranks that write, the same on every rank. Collective unless `is_known`, which is the same too."""
        ranks: tuple[int, ...] = (self.save_on_rank,)
        if self._shares():
            ranks = self._sharing_ranks(backend, timeout_s).find(sync_point, is_known=is_known)
        return WriterGroup(ranks=ranks, check_replicas=self.check_replicas)

    def _sharing_ranks(self, backend: Backend, timeout_s: float | None) -> WriterSearch:
        same_node, cache = self.share_write == "node", self._writers
        return WriterSearch(
            backend, self.storage, self.save_on_rank, same_node=same_node, cache=cache, timeout_s=timeout_s
        )

    def shard_writers(self, backend: Backend, *, timeout_s: float | None) -> WriterSearch:
        """Rank-local. Return what finds the ranks that write sharded tensors."""
        return WriterSearch(backend, self.storage, self.save_on_rank, cache=self._shard_writers, timeout_s=timeout_s)

    def make_writer(
        self, backend: Backend, filename: str, manifest: Manifest, group: WriterGroup, key: str = ""
    ) -> RankWriter:
        """Rank-local. Return this rank's writer of a save in steps."""
        options = self._options()
        check_save_options(options)
        check_name(filename)
        self._unloadable.discard(filename)
        is_writer = self._writes_on(backend)
        return RankWriter(
            self.storage,
            filename,
            manifest=manifest,
            memory=self._staging_memory(),
            write_range=group.range_of(backend.rank) if len(group.ranks) > 1 else WHOLE if is_writer else None,
            is_coordinator=is_writer,
            in_background=self.background,
            pickle_protocol=options.get("pickle_protocol", 2),
            num_threads=get_num_threads(backend.world_size),
            deferred_devices=self._deferred_devices if self.overlap_copy else (),
            check_replicas=group.check_replicas,
            on_refused=functools.partial(self._on_refused, filename, key),
        )

    @property
    def removal_order(self) -> RemovalOrder:
        """When a Checkpoint removes evicted files."""
        is_own = runs_methods_of(self, DiskSaver, "__call__", "_save_func", "remove")
        return RemovalOrder.AFTER if is_own else RemovalOrder.AFTER_KEEPING

    def refuse_last_loadable(self, filename: str, kept: Collection[str], written: str | None = None) -> None:
        """Raise StillNeeded if `filename` is the last file that can be loaded. Rank-local. Callable from any thread.

        Args:
            filename: the file to remove.
            kept: the files that stay.
            written: one of `kept` that this object has written, so that it need not be read; None for none.
        """
        has_other = written is not None and written not in self._unloadable
        others = (self.dirname / name for name in kept if name not in (filename, written))
        if not has_other and not any(map(is_loadable, others)) and is_loadable(self.dirname / filename):
            raise StillNeeded(f"{filename} is kept: load_objects would refuse every other")
        self._unloadable.discard(filename)

    @contextlib.contextmanager
    def keeping(self, files: frozenset[tuple[int, int]]) -> Iterator[None]:
        """Keep :meth:`remove` from removing the files with these devices and inodes."""
        self._kept = files
        try:
            yield
        finally:
            self._kept = frozenset()

    def remove(self, filename: str) -> None:
        """Remove `filename` on the coordinator. Rank-local; issues no collectives.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the name would leave the directory, or meets a symlink.
        """
        check_name(filename)
        if self._writes_on(current()) and identity_of(self.dirname / filename) not in self._kept:
            self.storage.remove(filename)


# ignite's code takes the directory from instances of its own DiskSaver: make this class count as one.
_IgniteDiskSaver.register(DiskSaver)
