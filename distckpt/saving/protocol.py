"""The protocol of one save.

1. (all ranks) make a ``SaveIntent``: this rank's step, score and history. User code runs here.
2. (all ranks) compute the ``SaveDecision`` from all intents, by pure functions: :func:`decide`.
3. (all ranks) gather the optimizer states of a ``ZeroRedundancyOptimizer``, then capture: call ``state_dict()``.
   Compare what the ranks hold under each key: :mod:`distckpt.saving.object_forms`.
4. (all ranks) plan the file's image. If several ranks write the file, compare their plans; if these differ, the
   coordinator writes the whole file. In a background save, copy the state to host memory: training may continue.
5. (each writer) write and sync a range of the image. In a background save this runs on a thread, without collectives.
6. (all ranks) exchange the writers' results. An error on one rank is raised on every rank, and the file is deleted.
7. (coordinator) write the tail and commit the file; then remove the files that it replaces. In a background save this
   runs on a thread too.
8. (all ranks) exchange the result of the commit, and adopt the new history.

:func:`start_save` runs steps 3 and 4, and starts step 5; :class:`~distckpt.saving.pending_save.PendingSave` runs the
rest. A coordinator that writes alone runs step 7 right after step 5. So does a coordinator that learns of the other
writers from the job's key-value store.

A save of one writer in the foreground takes three reductions, for steps 2, 4 and 8, and a gather if the ranks' intents
differ. tests/distributed/test_collectives.py counts those of each way of saving.

:func:`save_by_handler` replaces steps 4 to 7 for save handlers that write by themselves: the call returns when the file
is durable. :func:`remove` then removes the replaced files.

IMPORTANT: nothing is removed before the new file is committed. If several ranks each commit a file of their own,
nothing is removed before step 8. The exception is a save handler that may store several names in one place: there the
removal comes first.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from distckpt.backends.base import Backend, default_timeout_s
from distckpt.coordination import phases
from distckpt.errors import CommitNotDurable, ReplicasDiffer, SaveError, save_error
from distckpt.policy.decision import AgreedSave, SaveIntent, SavePolicy, decide_from, find_coordinator
from distckpt.policy.history import Entry, History
from distckpt.policy.naming import printable
from distckpt.policy.policies import SavedFile
from distckpt.saving.object_forms import CapturedObjects
from distckpt.saving.pending_save import WRITE_TIMEOUT_S, PendingSave, Problems, SyncPointFactory
from distckpt.saving.rank_writer import RankWriter
from distckpt.saving.shard_exchange import exchange_shards
from distckpt.saving.shards import Shards
from distckpt.saving.writer_group import WriterGroup, WriterSearch

_KEPT = ("history", "orphans", "former")
"""The fields of an intent that grow with the number of checkpoints. At first the ranks exchange only their digest."""


def decide(
    backend: Backend, sync_point: SyncPointFactory, intend: Callable[[], SaveIntent], *, timeout_s: float | None
) -> AgreedSave:
    """Collective. Run steps 1 and 2.

    1. (all ranks) exchange the intents, with a digest of what each rank's handler keeps.
    2. (all ranks) only if the digests differ: take what the coordinator's handler keeps. They differ after a failure on
       some ranks, after a load on some, and where only the coordinator has searched its directory.
    3. (all ranks) decide.

    Args:
        backend: the job's backend.
        sync_point: makes a phase's sync point from its description.
        intend: returns this rank's intent.
        timeout_s: seconds to wait for the other ranks; None for the default.

    Raises:
        RemoteRankError: user code failed on some rank; on every rank.
        ValueError: the ranks name different coordinators, or one that does not exist; on every rank.
    """
    if backend.world_size == 1:
        return decide_from([intend()])
    made: list[SaveIntent] = []

    def make() -> dict[str, Any]:
        own = intend()
        made.append(own)
        sent = {one.name: getattr(own, one.name) for one in fields(own) if one.name not in _KEPT}
        return sent | {"policy": own.policy.to_plain()}

    answers = phases.run(backend, sync_point("deciding what to save"), make, timeout_s=timeout_s)
    (own,) = made
    kept = {name: getattr(own, name) for name in _KEPT}
    intents = [
        SaveIntent(**{**answer, "policy": SavePolicy.from_plain(answer["policy"])}, **kept) for answer in answers
    ]
    if len({intent.digest for intent in intents}) == 1:
        return decide_from(intents)
    coordinator = find_coordinator(intents)

    def send() -> list[Any]:
        if backend.rank != coordinator:
            return []
        return [list(own.history), [tuple(file) for file in own.history.files], own.orphans, own.former]

    point = sync_point("taking over what the coordinator keeps")
    entries, files, orphans, former = phases.run(backend, point, send, timeout_s=timeout_s)[coordinator]
    history = History(map(tuple, entries), (SavedFile(*file) for file in files))
    return decide_from([replace(intent, history=history, orphans=orphans, former=former) for intent in intents])


def start_save(
    backend: Backend,
    sync_point: SyncPointFactory,
    *,
    filename: str,
    coordinator: int,
    consolidate: Callable[[], None] | None,
    capture: Callable[[], Any],
    objects: CapturedObjects,
    replicas: Callable[[], Collection[int]],
    optimizer_storages: Callable[[], Mapping[int, str]],
    make_writer: Callable[[], RankWriter],
    group: WriterGroup,
    remove_replaced: Callable[[], Problems] | None,
    annotate: Callable[[SaveError], SaveError],
    in_background: bool,
    shards: Shards,
    shard_writers: WriterSearch,
    timeout_s: float | None,
    path: Path | None = None,
    reports_errors: bool = False,
) -> PendingSave:
    """Collective. Run steps 3 and 4, and start step 5.

    Args:
        backend: the job's backend.
        sync_point: makes a phase's sync point from its description.
        filename: name of the file.
        coordinator: rank that commits it.
        consolidate: gathers optimizer states on the coordinator; None if there are none. It is collective, so it is not
            done in `capture`, where user code may fail on one rank.
        capture: returns the checkpoint on this rank.
        objects: the modules and optimizers that `capture` finds.
        replicas: returns the identities of the storages that are equal on all ranks.
        optimizer_storages: returns the identities of the storages that only an optimizer's step changes, with the types
            of their devices.
        make_writer: returns this rank's writer.
        group: the ranks that write.
        remove_replaced: removes the files that this one replaces, on the coordinator; None if the caller does it.
        annotate: adds rank, step and the intact checkpoint to an error.
        in_background: whether the state is copied to host memory before this returns.
        shards: takes the sharded tensors of what `capture` returns.
        shard_writers: finds the ranks that write if there are sharded tensors.
        timeout_s: seconds to wait for the other ranks; None for the default.
        path: full path of the file, for messages.
        reports_errors: whether each rank logs its errors, and warns at exit of a file that was not saved.

    Raises:
        RemoteRankError: a step failed on some rank; on every rank. With one rank: that rank's error.
        ShardedStateError: the ranks have different objects under one key; on every rank.
        ReplicasDiffer: replicas differ between ranks; on every rank.
    """
    write_timeout_s = max(default_timeout_s() if timeout_s is None else timeout_s, WRITE_TIMEOUT_S)
    writers, layout_difference = group.ranks, None
    prepared: list[RankWriter] = []

    def prepare() -> dict[str, Any]:
        writer = make_writer()
        prepared.append(writer)
        state = backend.sync_device(capture(), to_host=writer.is_coordinator or writer.is_shared)
        try:
            answer = writer.prepare(state, shards=shards, replicas=replicas, optimizer_storages=optimizer_storages)
        except SaveError as error:
            raise annotate(error) from error
        answer["objects"] = objects.digests()
        if answer["shards"] is not None:
            answer["knows_writers"] = shard_writers.is_known()
        return answer

    try:
        if consolidate is not None:
            phases.run(backend, sync_point(f"consolidating {filename}"), consolidate, timeout_s=timeout_s)
        # The long timeout: a rank may wait for staging memory until another save has written its bytes.
        staging_timeout_s = write_timeout_s if in_background or len(writers) > 1 else timeout_s
        answers = phases.run(backend, sync_point(f"staging {filename}"), prepare, timeout_s=staging_timeout_s)
        (writer,) = prepared
        found = [answer["objects"] for answer in answers]
        objects.compare(backend, sync_point, filename, found, coordinator, timeout_s=timeout_s)
        if group.check_replicas:
            point = sync_point(f"comparing replicas for {filename}")
            checksums = phases.run(backend, point, writer.replica_checksums, timeout_s=write_timeout_s)
            _check_replicas(checksums, coordinator)
        sharded_writers = exchange_shards(
            backend,
            sync_point,
            filename,
            writer,
            shards,
            answers,
            shard_writers,
            coordinator,
            timeout_s=write_timeout_s,
        )
        writers = sharded_writers or writers
        if len({answers[rank]["layout"] for rank in writers}) > 1:
            point = sync_point(f"comparing layouts of {filename}")
            layouts = phases.run(backend, point, writer.describe_layout, timeout_s=timeout_s)
            layout_difference = _layout_difference({rank: layouts[rank] for rank in writers}, coordinator)
        if layout_difference is not None:
            point = sync_point(f"staging all of {filename}")
            phases.run(backend, point, writer.write_alone, timeout_s=write_timeout_s)
            writers = (coordinator,)
    except BaseException:
        for writer in prepared:
            writer.abort()
        raise
    return PendingSave(
        backend,
        sync_point,
        writer,
        coordinator=coordinator,
        writers=writers,
        file_token=answers[coordinator]["file_token"],
        save_id=answers[coordinator]["save_id"],
        layout_difference=layout_difference,
        remove_replaced=remove_replaced,
        annotate=annotate,
        timeout_s=timeout_s,
        path=path,
        reports_errors=reports_errors,
    )


def _check_replicas(checksums: Sequence[Sequence[Sequence[Any]]], coordinator: int) -> None:
    ours = [tuple(one) for one in checksums[coordinator]]
    for rank, found in enumerate(checksums):
        theirs = [tuple(one) for one in found]
        if theirs == ours:
            continue
        names = [one[0] for one, other in zip(ours, theirs, strict=False) if one != other]
        what = f"the first tensor that differs is {names[0]}" if names else f"{len(theirs)} tensors against {len(ours)}"
        raise ReplicasDiffer(
            f"replicas differ between rank {rank} and rank {coordinator}: {what}. "
            "Nothing was saved. Was a parameter changed on one rank alone, or a gradient not reduced?"
        )


def _layout_difference(layouts: Mapping[int, Sequence[str]], coordinator: int) -> str | None:
    """Return the first difference between the ranks' layouts as a phrase; None if they can write one file together."""
    ours = layouts[coordinator]
    for rank, theirs in layouts.items():
        for one, other in zip(ours, theirs, strict=False):
            if one != other:
                return f"rank {coordinator} has {one!r}, rank {rank} has {other!r}"
        if len(ours) != len(theirs):
            return f"rank {coordinator} has {len(ours) - 1} replicas, rank {rank} has {len(theirs) - 1}"
    return None


def save_by_handler(
    backend: Backend,
    sync_point: SyncPointFactory,
    agreed: AgreedSave,
    *,
    consolidate: Callable[[], None] | None,
    capture: Callable[[], Any],
    objects: CapturedObjects,
    remove_first: Callable[[], Sequence[str]],
    write: Callable[[Any], None],
    all_write: bool,
    timeout_s: float | None,
) -> None:
    """Collective. Run step 3, then let a save handler write and commit.

    Args:
        backend: the job's backend.
        sync_point: makes a phase's sync point from its description.
        agreed: what :func:`decide` returned; nothing is saved if it holds no decision.
        consolidate: gathers sharded state on the coordinator; collective. None if there is none.
        capture: returns the checkpoint on this rank.
        objects: the modules and optimizers that `capture` finds.
        remove_first: removes files that must go before the write, and returns their names; collective.
        write: passes the checkpoint to the save handler on this rank.
        all_write: whether every rank writes, and may take long. Otherwise only the coordinator writes, and it waits
            `timeout_s` for the other ranks.
        timeout_s: seconds to wait for the other ranks; None for the default.

    Raises:
        RemoteRankError: capture or write failed on some rank; on every rank. With one rank: that rank's error.
        ShardedStateError: the ranks have different objects under one key; on every rank.
        CommitNotDurable: the file has its name, but may not survive a power cut.
    """
    if agreed.decision is None:
        return
    filename = agreed.decision.filename
    if consolidate is not None:
        phases.run(backend, sync_point(f"consolidating {filename}"), consolidate, timeout_s=timeout_s)
    captured: list[Any] = []
    writes = all_write or backend.rank == agreed.coordinator

    def capture_here() -> dict[str, int]:
        captured.append(backend.sync_device(capture(), to_host=writes))
        return objects.digests()

    found = phases.run(backend, sync_point(f"capturing {filename}"), capture_here, timeout_s=timeout_s)
    objects.compare(backend, sync_point, filename, found, agreed.coordinator, timeout_s=timeout_s)
    removed = remove_first()
    point = sync_point(f"saving {filename}")

    def write_here() -> None:
        try:
            write(captured[0])
        except SaveError as error:
            kept = [entry for entry in agreed.intent.history if entry[1] not in removed]
            raise add_context(error, backend.rank, point.step, filename, kept) from error

    write_timeout_s = default_timeout_s() if timeout_s is None else timeout_s
    if all_write or backend.rank != agreed.coordinator:
        write_timeout_s = max(write_timeout_s, WRITE_TIMEOUT_S)
    phases.run(backend, point, write_here, timeout_s=write_timeout_s)


def add_context(error: SaveError, rank: int, step: int, filename: str, history: Sequence[Entry]) -> SaveError:
    """Return the error with rank and step, and with a checkpoint of `history` that is intact.

    A file with the name of the failed one is not called intact.
    """
    others = [name for _, name in history if name != filename]
    is_renamed = isinstance(error, CommitNotDurable)
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        intact = ""  # the directory is missing, and the older checkpoints may be
    elif others:
        intact = f" {others[-1]} {'was kept for that reason' if is_renamed else 'is intact'}."
    else:
        intact = "" if history else " There is no earlier checkpoint."
    return save_error(f"rank {rank}, step {step}: {error}.{intact}", error, renamed=is_renamed)


class StillNeeded(Exception):  # noqa: N818 - a reason to keep the file, not an error
    """Raised in place of the removal of a file that is still needed. A later save tries again."""


def remove_local(filenames: Sequence[str], remove_one: Callable[[str], None]) -> Problems:
    """Remove files on this rank. Rank-local; issues no collectives. Callable from any thread."""
    problems: Problems = {}
    for filename in filenames:
        try:
            remove_one(filename)
        except FileNotFoundError:
            gone, problem = True, f"{filename} was already gone"
        except StillNeeded as error:
            gone, problem = False, str(error)
        except ValueError as error:  # a name in a loaded history that points outside the directory
            gone, problem = True, f"{filename} is left alone: {error}"
        except Exception as error:  # noqa: BLE001 - a custom handler's; the new checkpoint is committed
            gone, problem = False, f"{filename} could not be removed: {type(error).__name__}: {error}"
        else:
            continue
        problems[filename] = [gone, printable(problem)]
    return problems


def merge_problems(filenames: Sequence[str], answers: Sequence[Mapping[str, Sequence[Any]]]) -> Problems:
    """Return the problems of all ranks, from each rank's :func:`remove_local`, in rank order."""
    found: Problems = {}
    for name in filenames:
        problems = [(rank, *answer[name]) for rank, answer in enumerate(answers) if name in answer]
        if problems:
            gone = all(is_gone for _, is_gone, _ in problems)
            found[name] = [gone, "; ".join(f"rank {rank}: {text}" for rank, _, text in problems)]
    return found
