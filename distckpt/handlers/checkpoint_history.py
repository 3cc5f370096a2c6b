"""What a Checkpoint has saved: which files are kept, and how one of them is found again.

Owns the history that is saved and loaded with a Checkpoint. Must not know how a file is written.
"""

import dataclasses
import os
import weakref
from abc import abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ignite.base.mixins import Serializable
from ignite.engine import Engine
from ignite.handlers.checkpoint import DiskSaver as IgniteDiskSaver

from distckpt._values import plain_score
from distckpt.handlers.disk_saver import DiskSaver
from distckpt.handlers.engine_events import get_tracked_handlers
from distckpt.handlers.runs import Origin
from distckpt.loading import api
from distckpt.loading.api import LoadReport
from distckpt.policy.decision import SavePolicy
from distckpt.policy.naming import format_score, printable
from distckpt.policy.retention import Entry
from distckpt.ptformat.records import Record

__all__ = ["ON_DISK", "CheckpointHistory", "IgniteDiskSaver", "KnownEngines", "Owner", "shown"]

ON_DISK = (DiskSaver, IgniteDiskSaver)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Owner:
    """What tells the files of a handler from those of others. Any thread.

    Attributes:
        identity: how its files are named, and its place among those that name theirs alike; as a record has it.
        names: of the objects in its files; empty where it does not know what it saves.
        held: the files that other handlers keep in the same directory.
        saved_in: the ids of the runs in which this process saved the handler's files, by their names.
    """

    identity: Mapping[str, Any]
    names: frozenset[str]
    held: frozenset[str]
    saved_in: Mapping[str, str]

    def has(self, handler: Mapping[str, Any]) -> bool:
        """Return True if a record names this handler."""
        given, own = dict(handler), dict(self.identity)
        own.pop("name", None)
        name = given.pop("name", None)
        return given == own and (not self.names or name in self.names)

    def refuse(self, filename: str, record: Record | None) -> None:
        """Raise an error where a file is another handler's.

        Args:
            filename: which file is to be removed.
            record: what it says of itself; None for nothing.

        Raises:
            ValueError: it is another handler's.
        """
        if filename in self.held:
            msg = "another handler of this program keeps it"
            raise ValueError(msg)
        if record is not None and not self.has(record.handler):
            msg = f"its manifest says that another handler saved it ({shown(record.handler)})"
            raise ValueError(msg)
        if record is not None and self.saved_in.get(filename, record.run.id) != record.run.id:
            msg = f"its manifest says that another run has saved it since ({record.run.id})"
            raise ValueError(msg)


class KnownEngines:
    """The engines that a handler is attached to. A copy of the handler is attached to none.

    Attributes:
        names: what the single object is called with which the handler was attached, of each time it was.
    """

    def __init__(self) -> None:
        self._engines: weakref.WeakSet[Engine] = weakref.WeakSet()
        self.names: set[str] = set()

    def __reduce__(self) -> tuple[Any, ...]:
        """Leave the engines behind."""
        return (KnownEngines, ())

    def add(self, engine: Engine) -> None:
        """Note an engine."""
        self._engines.add(engine)

    def with_others(self, engines: Iterable[Engine]) -> list[Engine]:
        """Return the engines that are still there, and `engines`, each once."""
        return list({id(one): one for one in (*self._engines, *engines)}.values())


def shown(handler: Mapping[str, Any]) -> str:
    """Return what a message says of a handler's identity."""
    told = [f"{key}={value!r}" for key, value in handler.items() if value not in (None, "", False, 0)]
    return printable(", ".join(told))


class CheckpointHistory(Serializable):
    """The part of :class:`~distckpt.Checkpoint` that remembers."""

    _state_dict_all_req_keys = ("_saved",)
    save_handler: Any
    score_function: Callable[..., Any] | None
    global_step_transform: Callable[..., int] | None
    ext: str
    _saved: "list[CheckpointHistory.Item]"
    _strays: tuple[str, ...]
    _directory: tuple[Any, str | None]
    _is_agreed: bool
    _known: "KnownEngines"
    _serial: int
    _origin: Origin | None
    _former: frozenset[str]
    _run_key: tuple[Any, ...] | None
    _is_untouched: bool
    _is_given: bool
    _saved_iteration: int | None
    _saved_in: dict[str, str]

    keeps_history: bool = False
    """Whether :meth:`reset` forgets nothing: before the first batch of a resumed run."""

    class Item(NamedTuple):
        """A kept checkpoint."""

        priority: int | float
        filename: str

    @abstractmethod
    def _rules(self) -> SavePolicy:
        """Return how files are named."""

    def _naming(self) -> dict[str, Any]:
        """Return what names the handler's files: what a user does not change from one run to the next."""
        rules = self._rules()
        return {
            "prefix": rules.prefix,
            "name": rules.name,
            "ext": rules.ext,
            "pattern": rules.pattern,
            "score_name": rules.score_name,
            "is_scored": self.score_function is not None,
        }

    def _peers(self, engines: Iterable[Engine] = ()) -> "list[CheckpointHistory]":
        """Return the other handlers that save into the same directory, as far as the engines know them.

        Args:
            engines: where to look beside those that this handler is attached to.
        """
        where = self._place()
        known = [one for engine in self._known.with_others(engines) for one in get_tracked_handlers(engine)]
        others = {id(one): one for one in known if isinstance(one, CheckpointHistory) and one is not self}
        return [one for one in others.values() if where is not None and one._place() == where]  # noqa: SLF001 - its kind's

    def _names(self) -> frozenset[str]:
        """Return the names of the objects in the handler's files; empty where it does not know what it saves."""
        return frozenset({self._rules().name})

    def _order(self, peers: "Iterable[CheckpointHistory]") -> int:
        """Return how many of the handlers that name their files as this one does were made before it."""
        naming = {**self._naming(), "name": None}
        alike = [one for one in peers if {**one._naming(), "name": None} == naming and one._names() & self._names()]  # noqa: SLF001 - its kind's
        return sum(one._serial < self._serial for one in alike)  # noqa: SLF001 - its kind's

    def _owner(self, engines: Iterable[Engine] = ()) -> "Owner":
        """Return what tells the handler's files from those of others in its directory.

        Its identity is the same in the next run: how its files are named, and, among handlers that name theirs alike
        in one directory, how many of them were made before.

        Args:
            engines: where others may be attached, beside those that this handler is attached to.
        """
        peers = self._peers(engines)
        return Owner(
            identity={**self._naming(), "order": self._order(peers)},
            names=self._names(),
            held=frozenset(item.filename for one in peers for item in one._saved),  # noqa: SLF001 - its kind's
            saved_in=dict(self._saved_in),
        )

    def _place(self) -> str | None:
        return os.path.realpath(self.save_handler.dirname) if isinstance(self.save_handler, ON_DISK) else None

    @property
    def last_checkpoint(self) -> str | Path | None:
        """The kept checkpoint of highest priority: with a score the best, else the latest.

        A path with a :class:`DiskSaver`, else the file name; None when there is none.
        """
        if not self._saved:
            return None
        filename = self._saved[-1].filename
        if not isinstance(self.save_handler, ON_DISK):
            return filename
        return self._path_of(filename)

    def _path_of(self, filename: str) -> Path:
        handler, directory = self._directory
        if handler is self.save_handler and directory is not None:
            return Path(directory) / filename
        path: Path = self.save_handler.dirname / filename
        return path

    def reset(self) -> None:
        """Forget the saved checkpoints, for an engine that runs several times independently. Files stay.

        Called by a handler of STARTED in a resumed run it forgets nothing: that run goes on with its history.
        """
        if not self.keeps_history:
            self._take_history((), ())

    def _take_history(
        self, kept: Iterable[Entry], strays: Iterable[str], iteration: int | None = None, origin: Origin | None = None
    ) -> None:
        """Take over what was saved before, in place of what the handler knows.

        Args:
            kept: the history, lowest priority first.
            strays: files that the next save is to remove.
            iteration: the engine's, at the last save.
            origin: what the next run goes on from.
        """
        self._saved = [CheckpointHistory.Item(*entry) for entry in kept]
        self._strays = tuple(strays)
        self._is_agreed = self._is_untouched = self._is_given = False
        self._run_key, self._saved_iteration, self._origin = None, iteration, origin
        self._saved_in = {}

    def _go_on(self, origin: Origin) -> None:
        """Take what was loaded for the history of the runs that the next one goes on from."""
        self._origin, self._is_given = origin, False

    def state_dict(self) -> "OrderedDict[str, list[tuple[int | float, str]]]":
        """Return the history: ``_saved``, a list of (priority, file name), lowest priority first."""
        return OrderedDict(_saved=[(item.priority, item.filename) for item in self._saved])

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take over a history. Loaded on the coordinator alone, it holds on every rank from the next event on.

        Args:
            state_dict: what :meth:`state_dict` returned; an older release's ``saved`` is accepted.

        Raises:
            TypeError: it is no mapping.
            ValueError: it lacks ``_saved``.
        """
        if isinstance(state_dict, Mapping) and "_saved" not in state_dict and "saved" in state_dict:
            state_dict = {"_saved": state_dict["saved"]}
        super().load_state_dict(state_dict)
        self._take_history(((plain_score(priority), str(name)) for priority, name in state_dict["_saved"]), ())
        self._is_given = True

    def reload_objects(
        self,
        to_load: Mapping[str, Any],
        load_kwargs: Mapping[str, Any] | None = None,
        *,
        verify: bool = True,
        **filename_components: Any,
    ) -> LoadReport:
        """Load one of this handler's files into objects, found by its name's components; see ``load_objects``.

        Args:
            to_load: objects with ``load_state_dict``.
            load_kwargs: for ``nn.Module.load_state_dict``.
            verify: compare the file with its checksums before any object is touched.
            filename_components: ``name``, ``score``, ``global_step``.

        Returns:
            The keys that a load with ``strict=False`` has passed over.

        Raises:
            AttributeError: the save handler is no :class:`DiskSaver`.
            Exception: what ``load_objects`` raises.
        """
        if not isinstance(self.save_handler, ON_DISK):
            msg = f"Checkpoint's `save_handler` should be of type `DiskSaver`, given {type(self.save_handler)}"
            raise AttributeError(msg)  # noqa: TRY004 - ignite's type
        rules = self._rules()
        rules = dataclasses.replace(rules, name=filename_components.get("name", rules.name))
        score = filename_components.get("score")
        told = format_score(score) if isinstance(score, float) else str(score)
        has_score = self.score_function is not None or rules.pattern is not None
        filename = rules.filename(score=told if has_score else None, global_step=filename_components.get("global_step"))
        path = self.save_handler.dirname / filename
        return api.load_objects(to_load, path, verify=verify, **(load_kwargs or {}))
