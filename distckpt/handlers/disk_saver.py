"""Checkpoints as files in a local directory.

Owns :class:`DiskSaver`: who writes, and what a directory must look like.
"""

import contextlib
import errno
import functools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from ignite.handlers.checkpoint import DiskSaver as _IgniteDiskSaver

from distckpt._threads import get_num_threads
from distckpt.backends.base import Backend
from distckpt.backends.detect import current
from distckpt.coordination.phases import SyncPoint, post_failure
from distckpt.handlers.arguments import check_choice, check_rank
from distckpt.handlers.build_manifest import about
from distckpt.handlers.save_handler import BaseSaveHandler, refuse_overrides
from distckpt.policy.naming import check_name
from distckpt.ptformat.loadable import RefusedObject, locate_refused
from distckpt.ptformat.manifest import Manifest
from distckpt.ptformat.reader import find_refused_names, is_loadable
from distckpt.ptformat.torch_format import check_save_options, uses_default_format
from distckpt.saving.api import warn_of_refused
from distckpt.saving.capture import plain_state
from distckpt.saving.protocol import StillNeeded
from distckpt.saving.rank_writer import RankWriter, write_file
from distckpt.saving.snapshot import WHOLE
from distckpt.saving.staging import HostMemory, thread_memory
from distckpt.saving.writer_group import WriterCache, WriterGroup, find_writers
from distckpt.storage.local import LocalFile, LocalStorage, make_directory
from distckpt.storage.written_files import identity_of

__all__ = ["DiskSaver", "ShareWrite", "WhenBusy", "is_own"]

ShareWrite = Literal["node", "world"] | None
WhenBusy = Literal["wait", "skip"]
_OF_XM_SAVE = ("master_only", "global_master")
_INSTEAD = {
    "_save_native": "Override `_save_func(checkpoint, path, func)` instead: every save calls it.",
    "_save_xla": "Override `_save_func(checkpoint, path, func)` instead: every save calls it.",
}


class DiskSaver(BaseSaveHandler):
    """Handler that saves a checkpoint on a disk, whole and durable.

    The file is written under a temporary name in the same directory, synced, renamed, and the directory is synced
    before the call returns. Only ``save_on_rank`` creates, writes and removes; the others return at once. Neither
    the constructor nor a call issues collectives: agreement is :class:`~distckpt.Checkpoint`'s.

    Args:
        dirname: the directory; ``~`` is expanded.
        atomic: write under a temporary name first. Off only for file systems that cannot rename: a failed save
            then leaves a partial file.
        create_dir: make the directory where it is missing.
        require_empty: refuse a directory that holds any ``*.pt``.
        save_on_rank: the rank that writes.
        background: a :class:`~distckpt.Checkpoint` that saves here returns as soon as the state is copied into host
            memory; the file is written beside training. It is there, and in the handler's history, a few iterations
            later, when all ranks have heard that it is durable; at the latest at the end of the run, or after
            :meth:`~distckpt.Checkpoint.wait_until_finished`. An error is raised then, on all ranks, and what was saved
            before is untouched. In such a run all ranks have to run the same number of iterations.
        when_busy: what a Checkpoint does whose last save is still under way: ``"wait"`` for it, or ``"skip"`` the new
            one.
        overlap_copy: in the background, copy parameters and optimizer states that lie on an accelerator while the next
            step computes; the optimizer's step waits for it, and so do distckpt's own loads. False where something
            else changes parameters in place before that: a handler that swaps averaged weights, or torch's
            ``load_state_dict``.
        own_memory: copy into memory of this saver's own. Else one image's worth of memory serves all savers of the
            process, and one waits for the other.
        share_write: ranks of the same ``"node"``, or of the whole ``"world"``, that see the same directory (a probe
            file tells) write the file together. Each copies and writes a share of what is known to be equal on all of
            them: the parameters of modules in `to_save` that are wrapped in DistributedDataParallel, and their
            optimizer's state. Everything else comes from ``save_on_rank``. Where the ranks' states differ in form,
            ``save_on_rank`` writes all, with a warning.
        check_replicas: compare checksums of what is known to be equal before each save; a difference is an error on
            all ranks that names the tensor.
        kwargs: keyword arguments of ``torch.save``; in an XLA job also those of ``xm.save``. ``master_only=False``:
            every replica writes, each into a `dirname` of its own. ``global_master=False``, said expressly: the first
            replica of each machine writes, for disks that the machines do not share.

    A call of its own saves in the foreground, alone. So does a Checkpoint with a subclass that overrides ``__call__``
    or ``_save_func``, whatever `background` and `share_write` say.

    Attributes:
        dirname: the directory, as a path.
        save_on_rank: see above.
        background: see above.
        when_busy: see above.
        overlap_copy: see above.
        share_write: see above.
        check_replicas: see above.
        kwargs: see above.

    Raises:
        TypeError: `dirname` is neither str nor Path, or `save_on_rank` no int.
        ValueError: the directory is missing or not empty, where every rank looks for itself; or an argument has a wrong
            value.
        OSError: the directory cannot be made.

    Example:
        >>> import tempfile, torch
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     saver = DiskSaver(folder)
        ...     saver({"a": torch.ones(2)}, "a.pt")
        ...     torch.load(saver.dirname / "a.pt", weights_only=True)
        {'a': tensor([1., 1.])}
    """

    _deferred_devices: ClassVar[tuple[str, ...]] = ("cuda",)  # deferred copies slow a CPU down

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
        **kwargs: Any,
    ) -> None:
        if not isinstance(dirname, str | os.PathLike):
            msg = f"Argument dirname should be a string or Path object, but given {type(dirname)}"
            raise TypeError(msg)
        check_rank(save_on_rank)
        check_choice("when_busy", when_busy, ("wait", "skip"))
        check_choice("share_write", share_write, (None, "node", "world"))
        self.dirname = Path(dirname).expanduser()
        self.save_on_rank = save_on_rank
        self.background = bool(background)
        self.when_busy = when_busy
        self.share_write = share_write
        self.check_replicas = bool(check_replicas)
        self.kwargs = kwargs
        self.overlap_copy = bool(overlap_copy)
        self._memory = HostMemory() if own_memory else None
        self._writers = WriterCache()
        self._atomic = bool(atomic)
        self._key = ""
        self._unloadable: set[str] = set()  # what this saver wrote and loading refuses
        self._manifest: Manifest | None = None
        self._kept = frozenset[tuple[int, int]]()
        backend = current()
        # What fails here on some ranks only reaches the others at the handler's first event, through a note.
        self._object_id = backend.next_object_id(type(self).__name__)
        try:
            self._look(backend, create_dir=bool(create_dir), require_empty=bool(require_empty))
        except (ValueError, OSError) as error:
            if self._object_id is not None:
                post_failure(backend, self._object_id, error)
            raise

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        refuse_overrides(cls, _INSTEAD)

    @property
    def storage(self) -> LocalStorage:
        """The directory, as the engine writes to it."""
        return LocalStorage(self.dirname, atomic=self._atomic)

    @property
    def writes_on_one_rank(self) -> bool:
        """Whether ``save_on_rank`` alone writes."""
        return current().name != "xla" or (
            self.kwargs.get("master_only", True) and self.kwargs.get("global_master", True)
        )

    def _writes_on(self, live: Backend) -> bool:
        if self.writes_on_one_rank:
            return live.rank == self.save_on_rank
        return not self.kwargs.get("master_only", True) or live.local_rank == 0

    @property
    def ticket(self) -> str | None:
        """What notes about this saver's construction stand under, if the runtime has a place for them."""
        return self._object_id

    def _look(self, backend: Backend, *, create_dir: bool, require_empty: bool) -> None:
        if self._writes_on(backend):
            self._check_and_setup(self.dirname, create_dir, require_empty)
        elif self.dirname.exists() or not create_dir:
            # Else the saving rank makes it; here it may be another node's disk.
            DiskSaver._check_and_setup(self.dirname, create_dir=False, require_empty=require_empty)

    @staticmethod
    def _check_and_setup(dirname: Path, create_dir: bool, require_empty: bool) -> None:
        """Make the directory and check it. Called by the constructor on the saving rank, as ignite's is.

        Args:
            dirname: the directory.
            create_dir: see the class.
            require_empty: see the class.

        Raises:
            ValueError: the directory is missing or not empty.
            OSError: it cannot be made, or is a file.
        """
        if create_dir:
            make_directory(dirname)
        if not dirname.exists():
            msg = f"Directory path '{dirname}' is not found"
            raise ValueError(msg)
        if not dirname.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(dirname))
        if require_empty:
            matched = sorted(path.name for path in dirname.iterdir() if path.name.endswith(".pt"))
            if matched:
                msg = (
                    f"Files {matched} with extension '.pt' are already present in the directory {dirname}. "
                    "If you want to use this directory anyway, pass `require_empty=False`."
                )
                raise ValueError(msg)

    def __call__(self, checkpoint: Mapping[str, Any], filename: str, metadata: Mapping[str, Any] | None = None) -> None:
        """Save `checkpoint` as `filename` on the saving rank. Rank-local; issues no collectives.

        Args:
            checkpoint: what ``torch.save`` takes.
            filename: relative to the directory; must not leave it.
            metadata: not used by this handler.

        Raises:
            TypeError: a keyword argument of the constructor is none of ``torch.save``'s; on every rank.
            ShardedStateError: the checkpoint holds a tensor of which this rank has a part; on every such rank.
            ValueError: the name would leave the directory, or meets a symlink.
            SaveError: the file could not be written; what was there before is untouched.
            CommitNotDurable: it is there, but may not survive a power cut.
        """
        del metadata
        self.save_with(plain_state(checkpoint, "the checkpoint", convert_numpy=False), filename, about(current()))

    def save_with(self, checkpoint: Mapping[str, Any], filename: str, manifest: Manifest, key: str = "") -> None:
        """Save `checkpoint` with what its manifest is to say, but for the tensors; else as a call does.

        Args:
            checkpoint: what ``torch.save`` takes.
            filename: relative to the directory.
            manifest: but for the tensors.
            key: the object's that `checkpoint` is the bare state of, for messages; empty for a mapping of several.
        """
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
        """Write `checkpoint` to `path`, whole and durable. Called on the saving rank by every save in the foreground.

        Subclasses override it, as they do ignite's: to upload the file, or to write it by another function.

        Args:
            checkpoint: what ``torch.save`` takes.
            path: where, usually in the directory.
            func: ``torch.save`` for this library's own writer. Another function is called with the checkpoint, a file
                object, or the path where `atomic` is off, and this handler's keyword arguments.
            rank: without effect; older releases of ignite have it.

        Raises:
            ValueError: the name would leave the directory, or meets a symlink.
            SaveError: the file could not be written; what was there before is untouched.
            CommitNotDurable: it is there, but may not survive a power cut.
        """
        del rank
        path = Path(path)
        is_inside = path.is_relative_to(self.dirname)
        storage = LocalStorage(self.dirname if is_inside else path.parent, atomic=self._atomic)
        name = str(path.relative_to(storage.directory))
        if func is torch.save:
            live = current()
            write_file(
                storage,
                name,
                checkpoint,
                memory=self._staging_memory(),
                manifest=self._manifest or about(live),
                options=self._options(),
                num_threads=get_num_threads(live.world_size),
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
        return {name: value for name, value in self.kwargs.items() if not is_xla or name not in _OF_XM_SAVE}

    def _staging_memory(self) -> HostMemory:
        return thread_memory() if self._memory is None else self._memory

    @property
    def saves_in_parts(self) -> bool:
        """Whether a Checkpoint saves in steps that the ranks hear of each other in between.

        Keyword arguments of ``torch.save`` that choose another pickler or format ask for torch's own writer, which
        knows no such steps: those saves are in the foreground.
        """
        is_asked_for = self.background or self.share_write is not None or self.check_replicas
        return is_asked_for and uses_default_format(self.kwargs) and is_own(self, "__call__", "_save_func")

    def knows_writers(self, backend: Backend) -> bool:
        """Tell whether this rank knows who writes. Rank-local."""
        return not self._shares or self._writers.get(backend, self.storage, self.save_on_rank) is not None

    def writer_group(
        self, backend: Backend, place: Callable[[str], SyncPoint], *, is_known: bool, timeout_s: float | None
    ) -> WriterGroup:
        """Find out who writes. The same on every rank; collective unless `is_known`, on every rank."""
        writers: tuple[int, ...] = (self.save_on_rank,)
        if self._shares:
            found = self._writers.get(backend, self.storage, self.save_on_rank) if is_known else None
            if found is None:
                found = find_writers(
                    backend,
                    place,
                    self.storage,
                    coordinator=self.save_on_rank,
                    same_node=self.share_write == "node",
                    timeout_s=timeout_s,
                )
                self._writers.put(backend, self.storage, self.save_on_rank, found)
            writers = found
        return WriterGroup(ranks=writers, check_replicas=self.check_replicas)

    @property
    def _shares(self) -> bool:
        return self.share_write is not None and self.writes_on_one_rank

    def rank_writer(
        self, backend: Backend, filename: str, manifest: Manifest, group: WriterGroup, key: str = ""
    ) -> RankWriter:
        """Rank-local. Return this rank's part of a save; `key` as in :meth:`save_with`.

        Raises:
            TypeError: a keyword argument of the constructor is none of ``torch.save``'s.
            ValueError: the name would leave the directory.
        """
        options = self._options()
        check_save_options(options)
        check_name(filename)
        self._unloadable.discard(filename)
        is_writer = self._writes_on(backend)
        write_range = group.range_of(backend.rank) if len(group.ranks) > 1 else WHOLE if is_writer else None
        return RankWriter(
            self.storage,
            filename,
            manifest=manifest,
            memory=self._staging_memory(),
            write_range=write_range,
            is_coordinator=is_writer,
            in_background=self.background,
            pickle_protocol=options.get("pickle_protocol", 2),
            num_threads=get_num_threads(backend.world_size),
            deferred_devices=self._deferred_devices if self.overlap_copy else (),
            check_replicas=group.check_replicas,
            on_refused=functools.partial(self._on_refused, filename, key),
        )

    def _on_refused(self, filename: str, key: str, refused: Sequence[RefusedObject]) -> None:
        """Warn of what loading will refuse, and note that it is in the file."""
        self._unloadable.add(filename)
        warn_of_refused(self.dirname / filename, key, refused)

    def spare(self, filename: str, *, written: str, kept: Sequence[str]) -> None:
        """Refuse to remove the newest file that loads, where the one just written does not. Rank-local. Any thread.

        Args:
            filename: what is to be removed.
            written: what was just written.
            kept: what else is kept.

        Raises:
            StillNeeded: it is that file.
        """
        is_last = written in self._unloadable and not any(is_loadable(self.dirname / name) for name in kept)
        if is_last and is_loadable(self.dirname / filename):
            msg = f"{filename} is kept: load_objects would refuse every other"
            raise StillNeeded(msg)
        self._unloadable.discard(filename)

    def remover(self) -> Callable[[str], None]:
        """Return what removes a file on the rank that calls it, on any thread: there nobody need ask who it is."""
        return self.storage.remove

    @contextlib.contextmanager
    def keeping(self, files: frozenset[tuple[int, int]]) -> Iterator[None]:
        """Let :meth:`remove` pass over files that a save has just written, under whatever name it is given them.

        Args:
            files: device and inode of each.
        """
        self._kept = files
        try:
            yield
        finally:
            self._kept = frozenset()

    def remove(self, filename: str) -> None:
        """Remove `filename` on the saving rank. Rank-local; issues no collectives.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the name would leave the directory, or meets a symlink.
        """
        check_name(filename)
        if self._writes_on(current()) and identity_of(self.dirname / filename) not in self._kept:
            self.storage.remove(filename)


def is_own(handler: object, *methods: str, of: type = DiskSaver) -> bool:
    """Return True if `handler` runs a class's own `methods`, overridden neither by a subclass nor on the instance."""
    found = (getattr(type(handler) if name == "__call__" else handler, name, None) for name in methods)
    return all(getattr(one, "__func__", one) is getattr(of, name) for name, one in zip(methods, found, strict=True))


# Where ignite's own code asks for its DiskSaver, to find the directory, this one is meant too.
_IgniteDiskSaver.register(DiskSaver)
