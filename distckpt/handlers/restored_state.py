"""What was restored, until the first batch is trained: handlers that run before it do not undo or repeat it.

The handlers of STARTED run again in a resumed run, and in an epoch that had begun those of EPOCH_STARTED do. They reset
metrics and counters, step schedulers, initialise models: all that is in the restored state already. So the state is
noted before them, and what they have changed is put back after them.
"""

import contextlib
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ignite.engine import Engine

from distckpt._messages import log_level
from distckpt.backends.detect import current
from distckpt.coordination import phases
from distckpt.handlers.checkpoint import Checkpoint
from distckpt.handlers.rng_state import RngState
from distckpt.loading.noted import StateNote

__all__ = ["Restored"]

_logger = logging.getLogger(__name__)


class Restored:
    """The restored objects of one resume.

    Args:
        objects: by name, as the checkpoint was loaded into them; the same names on all ranks.
        handlers: whose history was restored.
        load_again: loads some of them again. Rank-local.
        timeout_s: seconds to wait for the other ranks; None for the default.

    Attributes:
        objects: all of them.
    """

    def __init__(
        self,
        objects: Mapping[str, Any],
        handlers: Sequence[Checkpoint],
        load_again: Callable[[Sequence[Any]], None],
        timeout_s: float | None,
    ) -> None:
        self.objects = list(objects.values())
        self._objects = {
            name: _UserKeys(one) if isinstance(one, Engine) else one
            for name, one in objects.items()
            if not isinstance(one, Checkpoint | RngState)
        }
        self._handlers = handlers
        self._load_again = load_again
        self._timeout_s = timeout_s
        self._notes: dict[str, StateNote | None] = {}

    def note(self, left_alone: Sequence[Any]) -> None:
        """Note what the objects are. Rank-local where their ``state_dict`` is.

        Args:
            left_alone: objects that are not to be asked for their state, as a loader that would begin to draw.
        """
        self._notes = {}
        for name, one in self._objects.items():
            if any(one is other for other in left_alone):
                continue
            if not isinstance(one, _UserKeys):
                self._notes[name] = None
            with contextlib.suppress(Exception):  # it is a user's; then it is loaded again
                self._notes[name] = StateNote(one)
        self.hold_histories()

    def hold_histories(self) -> None:
        """Let ``reset()`` of the handlers forget nothing, until :meth:`put_back`."""
        for one in self._handlers:
            one.keeps_history = True

    def put_back(self, where: str) -> None:
        """Collective. Load again what was changed since it was noted.

        1. (all ranks) find out what was changed; what is on any rank is loaded again on all.
        2. (all ranks) load it: from what was noted, or from the checkpoint.

        Args:
            where: the event whose handlers have run.

        Raises:
            RemoteRankError: something failed on some rank; alike on every rank.
        """
        for one in self._handlers:
            one.keeps_history = False
        backend = current()
        place = phases.SyncPoint(handler="resume", phase=f"looking for what {where} has changed", step=0)
        found = phases.run(backend, place, self._changed, timeout_s=self._timeout_s)
        names = [name for name in self._notes if any(name in one for one in found)]
        if not names:
            return
        place = phases.SyncPoint(handler="resume", phase=f"putting back what {where} has changed", step=0)
        phases.run(backend, place, lambda: self._load(names), timeout_s=self._timeout_s)
        _logger.log(
            log_level(backend.rank, {0}), "resume: handlers of %s changed %s: put back", where, ", ".join(names)
        )

    def _changed(self) -> list[str]:
        return [name for name, note in self._notes.items() if note is None or note.is_changed()]

    def _load(self, names: Sequence[str]) -> None:
        lost = []
        for name in names:
            note = self._notes[name]
            if note is None or not note.put_back():
                lost.append(self._objects[name])
        if lost:
            self._load_again(lost)


class _UserKeys:
    """What an engine's state holds under the keys that its program has added."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def state_dict(self) -> dict[str, Any]:
        return {key: getattr(self._engine.state, key, None) for key in self._engine.state_dict_user_keys}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for key, value in state.items():
            setattr(self._engine.state, key, value)
