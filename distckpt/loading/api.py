"""Load checkpoints into live objects: on all ranks together (:func:`load`, :func:`latest`), or on one rank alone.

A load from a file:

1. open the file once, so that the bytes that are verified are the bytes that are read.
2. verify the file, and meanwhile read its pickle and try it on the objects. No object is changed.
3. read the data that does not go straight into live tensors.
4. load the objects, and read the rest straight into their tensors.
"""

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from distckpt._threads import get_num_threads
from distckpt._values import check_timeout, valid_timeout
from distckpt.backends.detect import current
from distckpt.loading.dtensors import refuse_unloadable
from distckpt.loading.report import LoadReport
from distckpt.loading.restore import PreparedLoad, loaded_objects, prepare
from distckpt.loading.select import select_checkpoint, sort_newest_first
from distckpt.loading.verify_on_ranks import LoadContext, RefusedCheckpoint, verify_on_all_ranks
from distckpt.ptformat.reader import OpenCheckpoint
from distckpt.ptformat.records import read_records
from distckpt.saving.capture import check_objects, map_named

__all__ = ["LoadReport", "check_to_load", "latest", "load", "load_objects"]


def load(
    objects: Mapping[str, Any],
    path: str | os.PathLike[str],
    *,
    strict: bool = True,
    verify: bool = True,
    timeout_s: float | None = None,
) -> LoadReport:
    """Collective. Load a checkpoint into the objects of all ranks: all objects on all ranks, or none.

    1. (all ranks) verify the file; the ranks of a machine share the reading. Meanwhile try the state on the objects.
    2. (all ranks) if the state does not fit on one rank, no rank changes an object.
    3. (all ranks) load the objects; see :func:`load_on_all_ranks`.

    Args:
        objects: objects with ``load_state_dict``, in nested mappings and lists. DistributedDataParallel, DataParallel
            and torch.compile are unwrapped.
        path: a file that distckpt or ``torch.save`` wrote; only rank 0's path counts.
        strict: False to pass over missing and unexpected keys of modules.
        verify: compare the file with its checksums. False if that was just done, as by :func:`latest`.
        timeout_s: seconds to wait for the other ranks; None for ``DISTCKPT_TIMEOUT_S``, but at least 1800.

    Returns:
        The keys that were passed over on this rank; none if the load is strict.

    Raises:
        TypeError: an argument has the wrong type.
        LoadError: the file is damaged, unsafe or unsupported, or does not fit; see its subclasses. On several ranks it
            is a :class:`~distckpt.RemoteRankError` too, alike on every rank.
        OSError: the file cannot be read.
        PartialLoadError: the load failed in its last step; the objects that it names have to be loaded again.

    Example:
        >>> import tempfile
        >>> import distckpt, torch
        >>> model, twin = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     torch.save({"model": model.state_dict()}, f"{folder}/a.pt")
        ...     distckpt.load({"model": twin}, f"{folder}/a.pt")
        LoadReport(missing=(), unexpected=(), mismatched=())
        >>> torch.equal(model.weight, twin.weight)
        True
    """
    context = LoadContext(backend=current(), name="load", timeout_s=valid_timeout(timeout_s))

    def check_arguments() -> str:
        check_timeout(timeout_s)
        check_to_load(objects)
        if not isinstance(path, str | os.PathLike):
            raise TypeError(f"Argument path should be a string or Path object, but given {type(path)}")
        return str(Path(os.fspath(path)).expanduser())

    location = Path(context.run_phase("checking the arguments", check_arguments)[0])
    prepared: list[PreparedLoad] = []

    def try_state(file: OpenCheckpoint, state: Any) -> None:
        prepared.append(prepare(objects, state, {"strict": strict}, file if file.read_structure() else None))

    def take(unverified: OpenCheckpoint) -> bool:
        with contextlib.suppress(Exception):  # damage is reported before a mismatch, which fit() will raise
            try_state(unverified, unverified.state())
        return bool(prepared)

    try:
        file, state = verify_on_all_ranks(context, location, take=take, verify=verify)
    except RefusedCheckpoint as refusal:
        raise refusal.error from refusal.error.__cause__
    states = [state]
    del state

    def fit() -> None:
        if not prepared:
            try_state(file, states.pop())
        prepared[0].fill()

    with file:
        context.run_phase(f"fitting {location.name}", fit)
        return load_on_all_ranks(context, location.name, prepared[0])


def load_on_all_ranks(context: LoadContext, name: str, prepared: PreparedLoad) -> LoadReport:
    """Collective. Load objects on all ranks; if a rank fails, restore those that were changed, on all ranks.

    1. (all ranks) load the objects that may refuse their state.
    2. (all ranks) load plain modules, and read into live tensors. Only the reading can fail here.

    Args:
        context: the operation.
        name: of the file.
        prepared: this rank's load.

    Returns:
        The keys that were passed over on this rank.

    Raises:
        RemoteRankError: a rank failed; on every rank.
        PartialLoadError: some objects of this rank could not be restored.
    """
    reports: list[LoadReport] = []
    try:
        context.run_phase(f"loading {name}", prepared.load_refusable)
        context.run_phase(f"reading {name} into live tensors", lambda: reports.append(prepared.load_rest()))
    except BaseException as error:
        prepared.roll_back(error)
        raise
    return reports[0]


def latest(
    directory: str | os.PathLike[str], *, ext: str = "pt", verify: bool = True, timeout_s: float | None = None
) -> Path | None:
    """Collective. Return the newest checkpoint in a directory that is whole, the same one on all ranks.

    1. (rank 0) list the files, the newest first, as :func:`distckpt.resume` does: in the order of their saves, whatever
       their names and modification times are.
    2. (all ranks) verify one after another. A file that is damaged on some rank, or is not the same on all ranks, is
       passed over on all ranks; a warning in the log says why.

    Args:
        directory: the directory of the files; only rank 0's counts. It need not exist.
        ext: the files' extension, without the dot.
        verify: compare the files with their checksums.
        timeout_s: seconds to wait for the other ranks; None for ``DISTCKPT_TIMEOUT_S``, but at least 1800.

    Returns:
        The path; None if there are no files.

    Raises:
        LoadError: there are files, but none is whole; or a rank does not have a file that rank 0 has. Alike on every
            rank.
        OSError: the directory cannot be read.
        ValueError: `ext` or `timeout_s` has a wrong value; on every rank.

    Example:
        >>> import tempfile
        >>> import distckpt, torch
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     before = distckpt.latest(folder)
        ...     torch.save({"model": {}}, f"{folder}/a.pt")
        ...     before, distckpt.latest(folder).name
        (None, 'a.pt')
    """
    context = LoadContext(backend=current(), name="latest", timeout_s=valid_timeout(timeout_s))

    def list_files() -> dict[str, Any]:
        check_timeout(timeout_s)
        if not isinstance(ext, str) or not ext or ext.startswith(".") or set(ext) & set("*?[/"):
            raise ValueError(f"Argument ext should be an extension without the dot, such as 'pt', but given {ext!r}")
        folder = Path(os.fspath(directory)).expanduser()
        files = read_records(folder, ext, is_nested=False) if context.backend.rank == 0 else {}
        return {"directory": str(folder), "names": sort_newest_first(folder, files)}

    listing = context.run_phase("listing checkpoints", list_files)[0]
    if not listing["names"]:
        return None
    selected = select_checkpoint(context, Path(listing["directory"]), listing["names"], verify=verify)
    selected.file.close()
    return selected.path


def load_objects(
    to_load: Mapping[str, Any], checkpoint: str | Path | Mapping[str, Any], *, verify: bool = True, **kwargs: Any
) -> LoadReport:
    """Load a checkpoint into the objects of this rank: all of them, or none. Rank-local; issues no collectives.

    See :meth:`distckpt.Checkpoint.load_objects`.
    """
    if not isinstance(checkpoint, Mapping | str | Path):
        raise TypeError(f"Argument checkpoint should be a string or a dictionary, but given {type(checkpoint)}")
    check_to_load(to_load)
    if isinstance(checkpoint, Mapping):
        return prepare(to_load, checkpoint, kwargs).load()
    backend = current()
    with OpenCheckpoint(Path(checkpoint), num_threads=get_num_threads(backend.world_size)) as file:
        prepared = None
        if verify:
            # Ranks of a machine that load at once begin at different offsets: each reads what the others have not.
            with file.readahead_staggered(_spread(backend.local_rank)) as source:
                try:
                    prepared = prepare(to_load, file.state(), kwargs, file) if file.read_structure() else None
                except Exception:
                    file.verify(source)  # damage is reported before a mismatch
                    raise
                file.verify(source)
        if prepared is None:
            prepared = prepare(to_load, file.state(), kwargs, file if file.read_structure() else None)
        return prepared.load()


def _spread(number: int) -> float:
    """Return a fraction below 1, so that the fractions of the first n numbers are spread evenly for every n.

    Example:
        >>> [_spread(number) for number in range(5)]
        [0.0, 0.5, 0.25, 0.75, 0.125]
    """
    fraction, step = 0.0, 0.5
    while number:
        fraction, number, step = fraction + step * (number & 1), number >> 1, step / 2
    return fraction


def check_to_load(to_load: object) -> None:
    """Check the argument ``to_load``.

    Raises:
        TypeError: `to_load` is not a mapping, or an object has no ``load_state_dict``.
        ShardedStateError: an object is sharded in another way than by DTensors.
    """
    if not isinstance(to_load, Mapping):
        raise TypeError(f"Argument to_load should be a dictionary, but given {type(to_load)}")
    check_objects(dict(to_load), "load_state_dict")

    def refuse(name: str, obj: Any) -> None:
        for one in loaded_objects(obj):
            refuse_unloadable(name, one)

    map_named(refuse, dict(to_load))
