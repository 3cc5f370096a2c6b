"""Keep what a resume restored until the first batch is trained, whatever handlers change before it.

In a resumed run the handlers of STARTED run again, and in an interrupted epoch those of EPOCH_STARTED. They reset
metrics and counters, step schedulers, initialise models: the restored state holds the results already. So the state is
captured before these handlers, and what they have changed is restored after them, or where the checkpoint was saved
among them.

A large tensor is not copied. If its fingerprint has changed, it is loaded from the checkpoint again.
"""

import contextlib
import copy
import logging
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from ignite.engine import Engine

from distckpt._messages import log_level
from distckpt.backends.detect import current
from distckpt.coordination import phases
from distckpt.handlers.checkpoint import Checkpoint
from distckpt.handlers.engine_events import after_event
from distckpt.handlers.rng_state import RngState
from distckpt.loading.rollback import copy_state, is_same, load_own_state, own_state

_logger = logging.getLogger(__name__)
_SMALL_BYTES = 64 << 10
_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class SavedInEvent(NamedTuple):
    """The file name of a checkpoint, and the name of the event in which it was saved; None if unknown."""

    filename: str
    event_name: str | None


class RestoredState:
    """The objects that a resume restored, by names that are the same on all ranks.

    `handlers` are those whose histories were restored, and `saved` says which of them saved the checkpoint, and when.
    `load_again` loads some objects from the checkpoint again; it is rank-local.
    """

    def __init__(
        self,
        objects: Mapping[str, Any],
        handlers: Sequence[Checkpoint],
        saved: SavedInEvent,
        load_again: Callable[[Sequence[Any]], None],
        timeout_s: float | None,
    ) -> None:
        self.objects = list(objects.values())
        self._objects = {
            name: _UserKeys(obj) if isinstance(obj, Engine) else obj
            for name, obj in objects.items()
            if not isinstance(obj, Checkpoint | RngState)
        }
        self._handlers = handlers
        self.saved = saved
        self._load_again = load_again
        self._timeout_s = timeout_s
        self._captured: dict[str, _CapturedState | None] = {}

    def capture(self, excluded: Sequence[Any]) -> None:
        """Capture the objects' states, except for `excluded`: a loader's ``state_dict`` may start to draw."""
        self._captured = {}
        for name, obj in self._objects.items():
            if any(obj is other for other in excluded):
                continue
            if not isinstance(obj, _UserKeys):
                self._captured[name] = None
            with contextlib.suppress(Exception):  # the user's state_dict raised: the object is loaded again
                self._captured[name] = _CapturedState(obj)
        self.keep_histories()

    def keep_histories(self) -> None:
        """Let ``reset()`` of the handlers keep their histories until :meth:`restore_in_event` has restored."""
        for handler in self._handlers:
            handler.keeps_history = True

    def restore_in_event(self, engine: Engine, event_name: str, restore_more: Callable[[], None]) -> None:
        """Collective. Restore the objects in the engine's present event.

        The event was fired before the save. If the checkpoint was saved in it, it has the effects of the handlers
        before the one that saved it: the objects are restored when that handler is called. Otherwise it has the effects
        of all handlers, and the objects are restored after the event. Until then no Checkpoint saves.

        Args:
            engine: the engine.
            event_name: of the event that it fires.
            restore_more: called after the objects are restored.
        """
        is_restored = False

        def restore() -> None:
            nonlocal is_restored
            for one in self._handlers:
                one.resumes_with = None
            if not is_restored:
                is_restored = True
                self.restore_changed(f"handlers of {event_name}")
                restore_more()

        filename = self.saved.filename if self.saved.event_name == event_name else ""
        for one in self._handlers:
            is_saver = one._history.kept.has_name(filename)  # noqa: SLF001 - the other half of a resume
            one.resumes_with = restore if is_saver else lambda: None
        after_event(engine, lambda _: restore())

    def release_histories(self) -> None:
        """Let ``reset()`` of the handlers clear their histories again."""
        for handler in self._handlers:
            handler.keeps_history = False

    def restore_changed(self, changed_by: str) -> None:
        """Collective. Restore the objects that were changed since :meth:`capture`.

        Args:
            changed_by: what may have changed them, in the plural, for the log and for errors.

        1. (all ranks) find the changed objects. An object that was changed on any rank is restored on all.
        2. (all ranks) load the captured states, or the checkpoint again.
        """
        self.release_histories()
        backend = current()
        sync_point = phases.SyncPoint(handler="resume", phase=f"finding what {changed_by} have changed", step=0)
        answers = phases.run(backend, sync_point, self._find_changed, timeout_s=self._timeout_s)
        names = [name for name in self._captured if any(name in answer for answer in answers)]
        if not names:
            return
        sync_point = phases.SyncPoint(handler="resume", phase=f"restoring what {changed_by} have changed", step=0)
        phases.run(backend, sync_point, lambda: self._restore(names), timeout_s=self._timeout_s)
        _logger.log(log_level(backend.rank, {0}), "resume: %s changed %s: restored", changed_by, ", ".join(names))

    def _find_changed(self) -> list[str]:
        return [name for name, captured in self._captured.items() if captured is None or captured.is_changed()]

    def _restore(self, names: Sequence[str]) -> None:
        lost = []
        for name in names:
            captured = self._captured[name]
            if captured is None or not captured.restore():
                lost.append(self._objects[name])
        if lost:
            self._load_again(lost)


class _UserKeys:
    """The entries of an engine's state that the program has added."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def state_dict(self) -> dict[str, Any]:
        return {key: getattr(self._engine.state, key, None) for key in self._engine.state_dict_user_keys}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for key, value in state.items():
            setattr(self._engine.state, key, value)


class _CapturedState:
    """An object's state: copies of small values, fingerprints of large ones."""

    def __init__(self, obj: Any) -> None:
        self._obj = obj
        self._state = _map_leaves(own_state(obj), _capture_leaf)
        self._is_lost = False

    def is_changed(self) -> bool:
        """Return True if the object's state differs now."""
        changed = list(_find_differences(self._state, own_state(self._obj)))
        self._is_lost = any(isinstance(one, _Fingerprint) for one in changed)
        return bool(changed)

    def restore(self) -> bool:
        """Load the captured state; return False if :meth:`is_changed` found a large value changed: it has no copy."""
        if not self._is_lost:
            load_own_state(self._obj, _map_leaves(self._state, _restore_leaf))
        return not self._is_lost


class _Fingerprint:
    """A large tensor or array, and a sum of its bytes."""

    def __init__(self, value: Any) -> None:
        self.value = value
        self._fingerprint = _fingerprint_of(value)

    def matches(self, value: Any) -> bool:
        return type(value) is type(self.value) and _fingerprint_of(value) == self._fingerprint


def _capture_leaf(value: Any) -> Any:
    num_bytes = getattr(value, "nbytes", 0)
    is_large = isinstance(num_bytes, int) and num_bytes > _SMALL_BYTES
    is_memory = isinstance(value, torch.Tensor) or hasattr(type(value), "__array_interface__")
    return _Fingerprint(value) if is_large and is_memory else copy_state(value)


def _restore_leaf(value: Any) -> Any:
    return value.value if isinstance(value, _Fingerprint) else copy_state(value)


def _map_leaves(value: Any, function: Callable[[Any], Any]) -> Any:
    if type(value) in (list, tuple, deque):
        return type(value)(_map_leaves(item, function) for item in value)
    if isinstance(value, dict):
        twin = copy.copy(value)  # of its own type, with its attributes, such as a module's ``_metadata``
        for key, item in value.items():
            twin[key] = _map_leaves(item, function)
        return twin
    return function(value)


def _find_differences(captured: Any, value: Any) -> Iterator[Any]:
    """Yield the captured leaves that differ from a state, and the containers whose keys or length differ."""
    if isinstance(captured, _Fingerprint):
        if not captured.matches(value):
            yield captured
    elif isinstance(captured, Mapping):
        others = value if isinstance(value, Mapping) else {}
        if others is not value or list(captured) != list(others):
            yield captured
        for key, item in captured.items():
            yield from _find_differences(item, others.get(key))
    elif isinstance(captured, list | tuple | deque):
        items = list(value) if isinstance(value, list | tuple | deque) else None
        if items is None or len(items) != len(captured):
            yield captured
        items = [*(items or ()), *[None] * len(captured)]
        for item, other in zip(captured, items, strict=False):
            yield from _find_differences(item, other)
    elif type(captured) is not type(value) or not is_same(captured, value):
        yield captured


def _fingerprint_of(value: Any) -> tuple[Any, ...]:
    if not isinstance(value, torch.Tensor):
        return (value.shape, str(value.dtype), hash(value.tobytes()))
    kind = (tuple(value.shape), value.dtype, str(value.device))
    if (
        value.layout is not torch.strided
        or value.is_quantized
        or value.is_nested
        or value.device.type in ("meta", "xla")
    ):
        return (*kind, id(value), value._version)  # noqa: SLF001 - torch's count of writes to it
    with torch.no_grad():
        plain = torch.view_as_real(value.detach()) if value.is_complex() else value.detach()
        words = plain.view(_WORDS[plain.element_size()]) if plain.dtype is not torch.bool else plain
        return (*kind, int(words.sum(dtype=torch.int64)))
