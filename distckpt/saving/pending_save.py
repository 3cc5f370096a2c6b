"""One save that goes on beside training, or that several ranks write together: the order of its hops.

Owns the way from a decision to a committed file in steps that the ranks hear of each other in between. Must not know
about engines.

The protocol, once it is decided what to save (steps 1 and 2 of :mod:`distckpt.saving.protocol`):

3. (all ranks) where somebody's state is spread over the ranks: consolidate.
4. (all ranks) capture and :meth:`~distckpt.saving.rank_writer.RankWriter.prepare`. Then training may go on.
   Where ranks write together, their images have to be of one form. Ranks whose pickles are equal know that they are;
   the others compare form by form, and where they differ the saving rank stages and writes everything.
5. (each rank that writes, on a thread of its own or at once) write its share, and sync it. No collectives.
6. (all ranks) hear of all. An error is raised on every rank, and the file is given up.
7. (saving rank, again on a thread or at once) finish the file with everybody's checksums, commit it, remove what it
   replaces. A rank that writes alone has done so in 5; so has one that found the others' receipts on the job's board.
8. (all ranks) hear of it.

IMPORTANT: what is replaced is removed only after the commit; and where several ranks save each a file of its own, not
before 8.
"""

import contextlib
import functools
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from distckpt.backends.base import Backend, default_timeout_s
from distckpt.coordination import phases
from distckpt.errors import CollectiveError, ReplicasDiffer, SaveError
from distckpt.policy.decision import AgreedSave
from distckpt.saving.protocol import WRITE_TIMEOUT_S, remove_local, with_context
from distckpt.saving.rank_writer import Checked, RankWriter, Task
from distckpt.saving.write_completions import WriteCompletions

__all__ = ["PendingSave", "WriterGroup", "start_save"]

_LOOK_S = 0.2
"""How often a rank that waits looks whether another is lost."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WriterGroup:
    """Who writes, the same on every rank.

    Attributes:
        writers: the ranks that write one file together, in the order of their shares; of one that saves alone, itself.
        check_replicas: whether replicas are compared first.
    """

    writers: tuple[int, ...]
    check_replicas: bool = False


class PendingSave:
    """A save under way. All methods but the properties are called on all ranks alike.

    Attributes:
        agreed: what is saved.
        difference: why the saving rank writes all, where ranks were to write together; else None.
        problems: of all ranks, what became of the files to remove that were not removed; empty before the end.
        has_committed: whether this rank has committed a file, whatever became of the others.
        committed_at_s: when it has, on the monotonic clock, in seconds; None before, and on ranks that commit none.
        own_problems: of this rank, as `problems`.
        took_s: from the beginning to the end, in seconds.
    """

    def __init__(
        self,
        backend: Backend,
        place: Callable[[str], phases.SyncPoint],
        agreed: AgreedSave,
        part: RankWriter,
        *,
        writers: Sequence[int],
        temp: str | None,
        token: str | None,
        difference: str | None,
        remove_one: Callable[[str], None] | None,
        timeout_s: float | None,
    ) -> None:
        self.backend = backend
        self.agreed = agreed
        self.difference = difference
        self.problems: list[Mapping[str, Sequence[Any]]] = []
        self.has_committed = False
        self.committed_at_s: float | None = None
        self.own_problems: dict[str, list[Any]] = {}
        self.took_s = 0.0
        self._place = place
        self._part = part
        self._writers = tuple(writers)
        self._temp = temp
        self._remove_one = remove_one
        self._patience_s = max(default_timeout_s() if timeout_s is None else timeout_s, WRITE_TIMEOUT_S)
        self._begin_s = time.monotonic()
        self._task: Task | None = None
        self._checked: list[Sequence[Sequence[int]]] = []
        self._is_finishing = len(self._writers) == 1
        self._receipts: WriteCompletions | None = None
        if part.in_background and not self._is_finishing and token is not None:
            with contextlib.suppress(CollectiveError):  # then the votes tell
                board = backend.key_value_store(timeout_s=timeout_s)
                if board is not None:
                    self._receipts = WriteCompletions(board, place("").handler, token)
        self._begin(self._write, has_work=part.writes)

    @property
    def filename(self) -> str:
        """What is saved."""
        return "" if self.agreed.decision is None else self.agreed.decision.filename

    @property
    def writes(self) -> bool:
        """Whether this rank writes anything of the file."""
        return self.backend.rank in self._writers

    @property
    def is_pending(self) -> bool:
        """Whether this rank is still at work. Rank-local; waits for nothing."""
        return self._task is not None and not self._task.is_done()

    def advance(self, *, patience_s: float | None = None) -> bool:
        """Collective. Wait for all ranks' present step, and begin the next one.

        Args:
            patience_s: seconds to wait for the other ranks; None for as long as a disk may take.

        Returns:
            Whether the file is committed, and nothing is left to do.

        Raises:
            RemoteRankError: it failed on some rank; on every rank. In a world of one what was raised.
            CommitNotDurable: the file is in place, but may not survive a power cut.
        """
        doing = "committing" if self._is_finishing else "writing"
        try:
            answers = phases.run(
                self.backend,
                self._place(f"{doing} {self.filename}"),
                self._outcome,
                timeout_s=patience_s or self._patience_s,
            )
        except BaseException:
            self.give_up()
            raise
        if self._is_finishing or answers[self.agreed.coordinator]["is_finished"]:
            self.problems = [answer["problems"] for answer in answers]
            self.took_s = time.monotonic() - self._begin_s
            return True
        self._checked = [answers[rank]["checked"] for rank in self._writers]
        self._is_finishing = True
        self._begin(self._finish, has_work=self._part.is_coordinator)
        return False

    def wait_local(self) -> None:
        """Rank-local. Wait for this rank's present step; its error is kept."""
        if self._receipts is not None:
            self._receipts.call_off()
        if self._task is not None:
            self._task.wait()

    def give_up(self) -> None:
        """Rank-local. Let go of what is not committed, once this rank's step is done."""
        if self._receipts is not None:
            self._receipts.call_off()
        if self._task is not None:
            self._task.then(self._part.abandon)
        else:
            self._part.abandon()

    def _begin(self, work: Callable[[], dict[str, Any]], *, has_work: bool) -> None:
        """Begin a step: on a thread, or, in the foreground, where its outcome is asked for."""
        self._work = work
        self._task = Task(work) if self._part.in_background and has_work else None
        if self._task is not None:
            try:
                self._task.start()
            except BaseException:
                self._task.then(self._part.abandon)
                raise

    def _outcome(self) -> dict[str, Any]:
        try:
            self._heed_news()
            found: dict[str, Any] = self._work() if self._task is None else self._task.outcome()
        except SaveError as error:
            step = self._place("").step
            raise with_context(error, self.backend.rank, step, self.filename, self.agreed.history) from error
        return found

    def _heed_news(self) -> None:
        """Wait for this rank's step, but no longer than until a rank is known to be lost whose receipt it waits for.

        Raises:
            DistckptError: a rank is lost.
        """
        while self._receipts is not None and self._task is not None and not self._task.is_done(within_s=_LOOK_S):
            news = None if self.backend.monitor is None else self.backend.monitor.failure()
            if news is not None:
                self._receipts.call_off()
                raise news

    def _write(self) -> dict[str, Any]:
        others = [rank for rank in self._writers if rank != self.agreed.coordinator]
        is_other = self.backend.rank in others
        meet = None if self._receipts is None else functools.partial(self._meet, self._receipts, others)
        try:
            checked = self._part.write(self._temp, meet)
        except BaseException:
            if self._receipts is not None and is_other:
                self._receipts.leave(self.backend.rank, None)
            raise
        if self._receipts is not None and is_other:
            self._receipts.leave(self.backend.rank, checked)
        if self._receipts is not None and self._part.is_coordinator:
            found = self._receipts.wait_for(others)
            if found is not None:
                self._checked = [*found, checked]
                return self._finish()
        if not self._is_finishing:
            return {"checked": checked, "is_finished": False, "problems": {}}
        self._checked = [checked]
        return self._finish()

    def _meet(
        self, receipts: WriteCompletions, others: Sequence[int], checked: Checked, is_over: threading.Event
    ) -> list[Checked] | None:
        """Tell the saving rank what this one has checked; there: return what the others have."""
        if self._part.is_coordinator:
            return receipts.collect_checksums(others, is_over)
        receipts.publish_checksums(self.backend.rank, checked)
        return None

    def _finish(self) -> dict[str, Any]:
        self._part.finish(self._checked)
        self.has_committed = self._part.is_coordinator
        if self.has_committed:
            self.committed_at_s = time.monotonic()
        decision = self.agreed.decision
        found: dict[str, Any] = {"checked": [], "is_finished": True, "problems": {}}
        if self._remove_one is not None and self._part.is_coordinator and decision is not None:
            found["problems"] = self.own_problems = remove_local(decision.evicted, self._remove_one)
        return found


def start_save(
    backend: Backend,
    place: Callable[[str], phases.SyncPoint],
    agreed: AgreedSave,
    *,
    consolidate: Callable[[], None] | None,
    capture: Callable[[], Any],
    replicas: Callable[[], Collection[int]],
    optimizer_storages: Callable[[], Mapping[int, str]],
    make_writer: Callable[[], RankWriter],
    group: WriterGroup,
    remove_one: Callable[[str], None] | None,
    timeout_s: float | None,
) -> PendingSave:
    """Collective. Steps 3 and 4 of the protocol, and the beginning of 5.

    Args:
        backend: the job's.
        place: makes the place of a phase from what is done in it.
        agreed: what :func:`distckpt.saving.protocol.decide` returned; it holds a decision.
        consolidate: gathers what is sharded over the ranks; None where nothing is.
        capture: returns the checkpoint on this rank.
        replicas: returns the identities of the storages that are equal on all ranks.
        optimizer_storages: returns those that only an optimizer's step changes, with their devices' types.
        make_writer: returns this rank's part.
        group: who writes.
        remove_one: removes a file that is replaced, on the saving rank; None where the caller does it.
        timeout_s: seconds to wait for the other ranks; None for the default.

    Raises:
        RemoteRankError: something failed on some rank; on every rank. In a world of one what was raised.
        ReplicasDiffer: what was to be equal on all ranks is not; on every rank.
    """
    filename = "" if agreed.decision is None else agreed.decision.filename
    patience_s = max(default_timeout_s() if timeout_s is None else timeout_s, WRITE_TIMEOUT_S)
    writers, difference = group.writers, None

    parts: list[RankWriter] = []

    def prepare() -> dict[str, Any]:
        part = make_writer()
        parts.append(part)
        state = backend.sync_device(capture(), to_host=part.is_coordinator or part.is_shared)
        return part.prepare(state, replicas=replicas, optimizer_storages=optimizer_storages)

    try:
        if consolidate is not None:
            phases.run(backend, place(f"consolidating {filename}"), consolidate, timeout_s=timeout_s)
        # Patient: a rank may wait until another save's bytes are written, for its place in memory.
        answers = phases.run(backend, place(f"staging {filename}"), prepare, timeout_s=patience_s)
        if group.check_replicas:
            prints = phases.run(
                backend, place(f"comparing replicas for {filename}"), parts[0].fingerprints, timeout_s=patience_s
            )
            _check(prints, agreed.coordinator)
        if len(writers) > 1 and len({answers[rank]["form"] for rank in writers}) > 1:
            forms = phases.run(backend, place(f"comparing forms of {filename}"), parts[0].forms, timeout_s=timeout_s)
            difference = _difference({rank: forms[rank] for rank in writers}, agreed.coordinator)
            if difference is not None:
                phases.run(backend, place(f"staging all of {filename}"), parts[0].take_all, timeout_s=patience_s)
                writers = (agreed.coordinator,)
    except BaseException:
        for part in parts:
            part.abandon()
        raise
    return PendingSave(
        backend,
        place,
        agreed,
        parts[0],
        writers=writers,
        temp=answers[agreed.coordinator]["temp"],
        token=answers[agreed.coordinator]["token"],
        difference=difference,
        remove_one=remove_one,
        timeout_s=timeout_s,
    )


def _check(prints: Sequence[Sequence[Sequence[Any]]], coordinator: int) -> None:
    """Compare fingerprints, the same on every rank.

    Raises:
        ReplicasDiffer: they are not equal.
    """
    ours = [tuple(one) for one in prints[coordinator]]
    for rank, found in enumerate(prints):
        theirs = [tuple(one) for one in found]
        if theirs == ours:
            continue
        names = [one[0] for one, other in zip(ours, theirs, strict=False) if one != other]
        what = f"the first tensor that differs is {names[0]}" if names else f"{len(theirs)} tensors against {len(ours)}"
        msg = (
            f"what should be equal on all ranks is not: {what}, on rank {rank} other than on rank {coordinator}. "
            "Nothing was saved. Was a parameter changed on one rank alone, or a gradient not reduced?"
        )
        raise ReplicasDiffer(msg)


def _difference(forms: Mapping[int, Sequence[str]], coordinator: int) -> str | None:
    """Return a phrase about the first thing in which the ranks' images differ; None where they may be shared."""
    ours = forms[coordinator]
    for rank, theirs in forms.items():
        for one, other in zip(ours, theirs, strict=False):
            if one != other:
                return f"rank {coordinator} has {one!r}, rank {rank} has {other!r}"
        if len(ours) != len(theirs):
            return f"rank {coordinator} has {len(ours) - 1} replicas, rank {rank} has {len(theirs) - 1}"
    return None
