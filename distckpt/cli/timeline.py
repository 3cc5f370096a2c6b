"""Build the timeline of a directory's runs from its event record and its files, for ``distckpt plot``.

The record may be incomplete: a job was killed, recording was off for a while, or lines are torn. Saves that it lacks
are taken from the manifests of the existing files. Fields of unexpected types count as missing.
"""

import bisect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from distckpt.cli.survey import FileEntry, State
from distckpt.policy.naming import describe_handler
from distckpt.ptformat.manifest import number_from

KILLED = "killed"
COMPLETE = "complete"
ENDED = "ended"
NO_END = "no end recorded"
_MOST = 2**53
_LONGEST_S = 1e9
"""Longer durations count as missing."""


@dataclass(slots=True, kw_only=True)
class Save:
    """A committed save.

    Attributes:
        at_s: time of the call, in seconds since 1970.
        file: the file's name.
        handler: the handler's identity in words; None for a save without a handler.
        run: id of the run; None if unknown.
        iteration: number of trained iterations; None if unknown, as for all following attributes.
        epoch: the epoch in progress.
        score: the score, which may be NaN or infinite.
        num_bytes: length of the file.
        stall_s: time for which training stood still, in seconds.
        durable_s: time from the call to the commit, in seconds.
        is_there: True if the directory holds the file.
    """

    at_s: float
    file: str
    handler: str | None
    run: str | None
    iteration: int | None
    epoch: int | None
    score: float | None
    num_bytes: int | None
    stall_s: float | None = None
    durable_s: float | None = None
    is_there: bool = False


@dataclass(slots=True, kw_only=True)
class Session:
    """A call of ``engine.run()``, as far as it is known.

    Attributes:
        id: the session's id; None if it is known only from files.
        begin_s: time of its begin or its first event, in seconds since 1970.
        end_s: time of its last event, in seconds since 1970.
        start_iteration: number of iterations trained before; None if unknown.
        last_iteration: the iteration at which it would be complete; None if unknown.
        points: pairs of a time and the number of iterations trained by then.
        saves: the saves in order of time.
        resumed: the event of the resume; None if it did not resume, or if that is not recorded.
        stop: the reason given by the handler that stopped it; None if no handler did.
        signals: the signals received, such as ``rank 1: SIGTERM``.
        outcome: ``complete``, a reason to stop, the type of an error, or one of the constants above.
        lost: number of iterations that the next session trains again.
    """

    id: str | None
    begin_s: float
    end_s: float
    start_iteration: int | None = None
    last_iteration: int | None = None
    points: list[tuple[float, int]] = field(default_factory=list)
    saves: list[Save] = field(default_factory=list)
    resumed: Mapping[str, Any] | None = None
    signals: list[str] = field(default_factory=list)
    stop: str | None = None
    outcome: str = NO_END
    lost: int = 0

    @property
    def runs(self) -> set[str]:
        """The ids of the runs that the saves belong to."""
        return {save.run for save in self.saves if save.run is not None}

    @property
    def ancestors(self) -> set[str]:
        """The ids of the runs that the session resumed from."""
        if self.resumed is None:
            return set()
        lineage = self.resumed.get("lineage")
        named = lineage if isinstance(lineage, list) else []
        return {one for one in (self.resumed.get("run"), *named) if isinstance(one, str)}

    @property
    def reached(self) -> int | None:
        """The highest known number of trained iterations; None if unknown."""
        return max((iteration for _, iteration in self.points), default=None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeline:
    """The sessions of a directory, and the saves outside of sessions, in order of time."""

    sessions: Sequence[Session]
    others: Sequence[Save]
    num_dropped: int

    @property
    def saves(self) -> list[Save]:
        """All saves in order of time."""
        found = [*self.others, *(save for session in self.sessions for save in session.saves)]
        return sorted(found, key=lambda save: save.at_s)

    @property
    def lost(self) -> int:
        """The total number of iterations that were trained again."""
        return sum(session.lost for session in self.sessions)


def make_timeline(
    events: Iterable[Mapping[str, Any]], entries: Sequence[FileEntry], *, num_dropped: int = 0
) -> Timeline:
    """Return the timeline of a directory.

    Args:
        events: the events of its record.
        entries: its files.
        num_dropped: number of lines of the record that are not events.
    """
    sessions: dict[str, Session] = {}
    others: list[Save] = []
    for event in sorted(events, key=lambda event: float(event["at_s"])):
        name = event.get("session")
        if isinstance(name, str):
            at_s = float(event["at_s"])
            _take(sessions.setdefault(name, Session(id=name, begin_s=at_s, end_s=at_s)), event)
        elif event["event"] == "save":
            others.append(_save_of(event))
    found = list(sessions.values())
    _add_files(found, others, entries)
    found.sort(key=lambda session: (session.begin_s, session.end_s))
    for at, session in enumerate(found):
        session.saves.sort(key=lambda save: save.at_s)
        session.points.sort()
        _find_outcome(session, found[at + 1 :])
    return Timeline(sessions=found, others=others, num_dropped=num_dropped)


def _take(session: Session, event: Mapping[str, Any]) -> None:
    """Add an event to its session."""
    kind, at_s, iteration = event["event"], float(event["at_s"]), _whole(event.get("iteration"))
    if kind == "save":
        save = _save_of(event)
        session.saves.append(save)
        session.end_s = max(session.end_s, at_s + (save.durable_s or 0.0))
    session.end_s = max(session.end_s, at_s)
    if kind == "resume":
        session.resumed = event
        return
    if iteration is not None:
        session.points.append((at_s, iteration))
    if kind == "start":
        session.begin_s, session.start_iteration = at_s, iteration
        length, epochs = _whole(event.get("epoch_length")), _whole(event.get("max_epochs"))
        session.last_iteration = _whole(event.get("max_iters"))
        if session.last_iteration is None and length is not None and epochs is not None:
            session.last_iteration = length * epochs
    elif kind == "signal" and isinstance(event.get("signals"), list):
        signals = (one for one in event["signals"] if isinstance(one, Mapping))
        session.signals += [f"rank {one.get('rank')}: {one.get('signal')}" for one in signals]
    elif kind == "stop":
        session.stop = str(event.get("reason"))
    elif kind == "error":
        session.outcome = str(event.get("type"))
    elif kind == "end":
        is_complete = iteration is not None and session.last_iteration is not None
        is_complete = is_complete and (iteration or 0) >= (session.last_iteration or 0)
        session.outcome = session.stop or (COMPLETE if is_complete else ENDED)


def _save_of(event: Mapping[str, Any]) -> Save:
    handler, run = event.get("handler"), event.get("run")
    return Save(
        at_s=float(event["at_s"]),
        file=str(event.get("file")),
        handler=handler if isinstance(handler, str) else None,
        run=run if isinstance(run, str) else None,
        iteration=_whole(event.get("iteration")),
        epoch=_whole(event.get("epoch")),
        score=_number(event.get("score")),
        num_bytes=_whole(event.get("num_bytes")),
        stall_s=_seconds(event.get("stall_s")),
        durable_s=_seconds(event.get("durable_s")),
    )


def _add_files(sessions: list[Session], others: list[Save], entries: Sequence[FileEntry]) -> None:
    """Mark the saves whose files exist, and add the saves that the record lacks."""
    known: dict[tuple[str, str | None], Save] = {}
    for save in sorted([*others, *(save for one in sessions for save in one.saves)], key=lambda save: save.at_s):
        known[save.file, save.run] = save  # the newest save of a name wins
    for entry in entries:
        manifest, record = entry.manifest, entry.record
        if manifest is None or entry.state is not State.COMPLETE or entry.link is not None:
            continue
        run = None if record is None else record.run.id
        if (entry.name, run) in known:
            known[entry.name, run].is_there = True
            continue
        save = Save(
            at_s=entry.saved_s,
            file=entry.name,
            handler=None if record is None else describe_handler(record.handler),
            run=run,
            iteration=entry.step if record is None else record.iteration,
            epoch=manifest.epoch,
            score=_number(entry.score),
            num_bytes=entry.num_bytes,
            is_there=True,
        )
        if record is None:
            others.append(save)
        else:
            _session_for(sessions, save, record.run.lineage).saves.append(save)


def _session_for(sessions: list[Session], save: Save, lineage: Sequence[str]) -> Session:
    """Return the session that saved a file; a new session if none matches."""
    same = [one for one in sessions if save.run in one.runs]
    around = [one for one in sessions if not one.runs and one.begin_s <= save.at_s]
    if same:
        session = min(same, key=lambda one: abs(one.begin_s - save.at_s))
    elif around:  # killed after the commit of its first save, before the record had it
        session = max(around, key=lambda one: one.begin_s)
    else:
        session = Session(id=None, begin_s=save.at_s, end_s=save.at_s)
        session.resumed = {"run": lineage[-1], "lineage": list(lineage[:-1])} if lineage else None
        sessions.append(session)
    session.begin_s, session.end_s = min(session.begin_s, save.at_s), max(session.end_s, save.at_s)
    if save.iteration is not None:
        session.points.append((save.at_s, save.iteration))
    return session


def _find_outcome(session: Session, later: Sequence[Session]) -> None:
    """Set the session's outcome and its lost iterations, from the sessions after it."""
    successor = next((one for one in later if one.begin_s >= session.end_s and _goes_on(one, session)), None)
    if successor is None:
        return
    if session.outcome == NO_END and session.id is not None:
        session.outcome = KILLED
    if session.outcome != COMPLETE and None not in (session.reached, successor.start_iteration):
        session.lost = max((session.reached or 0) - (successor.start_iteration or 0), 0)


def _goes_on(later: Session, session: Session) -> bool:
    if later.resumed is None:  # it began anew, as did this session, which saved nothing
        return later.start_iteration == 0 and session.start_iteration == 0 and not session.saves
    return bool(later.ancestors & (session.runs | session.ancestors))


def iteration_time(session: Session, iteration: int) -> float:
    """Return the time at which a session had trained a number of iterations, interpolated between known points."""
    points = sorted(dict(session.points).items())
    at = bisect.bisect_left([trained for _, trained in points], iteration)
    if at == 0 or at == len(points):
        return session.begin_s if at == 0 else session.end_s
    (before_s, before), (after_s, after) = points[at - 1], points[at]
    return before_s + (after_s - before_s) * (iteration - before) / max(after - before, 1)


def _whole(value: object) -> int | None:
    is_whole = isinstance(value, int) and not isinstance(value, bool) and 0 <= value < _MOST
    return value if is_whole and isinstance(value, int) else None


def _seconds(value: object) -> float | None:
    found = _number(value)
    return found if found is not None and 0.0 <= found < _LONGEST_S else None


def _number(value: object) -> float | None:
    try:
        found = number_from(value)
        return float(found) if isinstance(found, int | float) and not isinstance(found, bool) else None
    except (KeyError, OverflowError):  # some other text; an integer too large for a float
        return None
