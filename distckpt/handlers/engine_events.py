"""Runs and events of engines on this thread: what runs after an event, and which handlers it has still to call.

ignite exposes neither. :mod:`distckpt.handlers.ignite_hooks` keeps this state, from wrappers of the engine's methods.
"""

import threading
import weakref
from collections.abc import Callable, Collection, Mapping
from typing import Any, ClassVar

from ignite.engine import Engine, Events, State

HOOKS = "_distckpt_hooks"
ATTACHMENTS = "_distckpt_attachments"
START_HOOK = "_distckpt_start_hook"
_RUN = "_distckpt_run"
_ITERATION_COMPLETED = Events.ITERATION_COMPLETED  # enum members are slow to look up
Action = Callable[[Engine], None]


class TrackedHandler:
    """Base of handlers whose attachments an engine records.

    Attachments are recorded as they are made: a profiler may later replace the entries of the engine's list.
    """

    may_run_early: ClassVar[bool]
    """Whether a save may call the handler before its own place in the event."""
    detects_nan: ClassVar[bool]
    """Whether the handler checks for NaN, so that a save needs its answer first."""

    def on_attach(self, engine: Engine, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Receive the engine and the further arguments that the handler is attached with."""


class Attachment:
    """A tracked handler on one event.

    If the handler may run early, this object replaces it in the engine's list and calls it at most once per firing.
    Programs that inspect the list see the handler's class and attributes.

    Attributes:
        tracked: the handler.
        event: the event, without a filter.
        original: the attached callable: the handler, or a wrapper of it.
    """

    def __init__(self, tracked: TrackedHandler, event: Any, original: Any, entry: tuple[Any, ...]) -> None:
        self.tracked = tracked
        self.event = event
        self.original = original
        self._function, self._args, self._kwargs = entry  # the first argument may be a weak reference to the engine

    def __eq__(self, other: object) -> bool:
        """Return True for the attached callable: ignite compares to find and remove handlers."""
        return other is self or self.original == other

    __hash__ = object.__hash__

    @property  # type: ignore[misc]  # object has a setter too
    def __class__(self) -> type:
        """The handler's class, for ``isinstance`` and profiles."""
        return type(self.tracked)

    def __getattr__(self, name: str) -> Any:
        """Return the handler's attribute; special methods, such as for copies, are not delegated."""
        if name == "tracked" or name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.tracked, name)

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        """Call the handler, unless the present firing has called it early."""
        firings = FIRINGS.stack
        if firings:
            called = firings[-1].called
            if id(self) in called:
                return
            called.add(id(self))
        self._function(*args, **kwargs)

    def call_early(self, firing: "Firing") -> None:
        """Call the handler as the firing would."""
        firing.called.add(id(self))
        self._call(self._function, firing.engine, firing.args, firing.kwargs)

    def call_original(self, engine: Engine) -> None:
        """Call the attached callable as the engine would, without the event's filter."""
        self._call(self.original, engine, (), {})

    def _call(
        self, function: Callable[..., Any], engine: Engine, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        first: tuple[Any, ...] = ()
        others = self._args
        if others and isinstance(others[0], weakref.ref):
            first, others = (engine,), others[1:]
        function(*first, *args, *others, **(self._kwargs | kwargs))


class KeepsEventName:
    """Base of engines that depend on ``last_event_name`` after each event, though handlers may have fired others."""


class Firing:
    """An event that an engine fires on this thread.

    Attributes:
        args: further arguments of the event's handlers.
        kwargs: further keyword arguments.
        actions: functions that run after the event; None for none.
        called: ids of the attachments that were called.
        is_iteration_due: whether the hook ``after_iteration`` is still to be called.
    """

    __slots__ = ("actions", "args", "called", "engine", "event", "is_iteration_due", "kwargs")

    def __init__(self, engine: Engine, event: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.engine = engine
        self.event = event
        self.args = args
        self.kwargs = kwargs
        self.actions: list[Action] | None = None
        self.called: set[int] = set()
        self.is_iteration_due = event is _ITERATION_COMPLETED

    def early_attachments(self) -> list[Attachment]:
        """Return the attachments that may run early and were not called."""
        attachments = get_attachments(self.engine, self.event)
        return [one for one in attachments if id(one) not in self.called and one.tracked.may_run_early]

    def end_iteration(self) -> None:
        """Call the hook ``after_iteration``, once."""
        if self.is_iteration_due:
            self.is_iteration_due = False
            hooks = get_hooks(self.engine)
            if hooks is not None:
                hooks.after_iteration(self.engine)


class Firings(threading.local):
    """The firings and runs of this thread, outermost first: replicas may be threads of one process.

    Attributes:
        stack: the firings.
        runs: the engines whose runs are under way, each with the number of firings around its run. References are
            weak: a program may abandon a run that is driven in steps.
    """

    def __init__(self) -> None:
        self.stack: list[Firing] = []
        self.runs: list[tuple[int, weakref.ref[Engine]]] = []


FIRINGS = Firings()


def get_hooks(engine: Engine | None) -> Any:
    """Return the object set by :func:`set_hooks`, or None. A handler may be called without an engine."""
    return None if engine is None else vars(engine).get(HOOKS)


def set_hooks(engine: Engine, hooks: Any) -> None:
    """Set the engine's hooks: an object with the methods of :class:`~distckpt.handlers.vote_rounds.EngineVotes`."""
    vars(engine)[HOOKS] = hooks


def get_run(engine: Engine) -> Any:
    """Return the object set by :func:`set_run`, or None."""
    return vars(engine).get(_RUN)


def set_run(engine: Engine, run: Any) -> None:
    """Call ``run.begin(engine)`` before the handlers of STARTED, and ``run.end(engine, error)`` at the end of a run."""
    vars(engine)[_RUN] = run


def set_start_hook(engine: Engine, hook: Any) -> None:
    """Call ``hook.before_run(engine, ...)`` with the arguments of the engine's next ``run()``; None removes the hook.

    If the hook returns a state, ``run()`` returns it at once.
    """
    vars(engine)[START_HOOK] = hook


def get_attachments(engine: Engine, event: Any) -> list[Attachment]:
    """Return the tracked handlers' attachments to the engine's event, in call order."""
    attachments: list[Attachment] = vars(engine).get(ATTACHMENTS, {}).get(event, [])
    return attachments


def get_tracked_handlers(engine: Engine) -> list[TrackedHandler]:
    """Return the engine's tracked handlers, each once, ordered by their events' first attachment."""
    attachments = [one for of_event in vars(engine).get(ATTACHMENTS, {}).values() for one in of_event]
    return list({id(one.tracked): one.tracked for one in attachments}.values())


def is_iteration_event(engine: Engine) -> bool:
    """Return True if the engine fires an event that occurs in each iteration."""
    event = engine.last_event_name
    # ITERATION_COMPLETED first: events are hashed in Python, and this runs in every iteration.
    return event is _ITERATION_COMPLETED or (event is not None and State.event_to_attr.get(event) == "iteration")


def enter_run(engine: Engine) -> None:
    """Count the engine among :func:`get_running_engines`, until :func:`leave_run`."""
    FIRINGS.runs.append((len(FIRINGS.stack), weakref.ref(engine)))


def leave_run(engine: Engine) -> None:
    """Reverse :func:`enter_run`. Does nothing if the engine is not counted on this thread."""
    runs = FIRINGS.runs
    for index in reversed(range(len(runs))):  # the last one, unless a program drives several runs in turn
        if runs[index][1]() is engine:
            del runs[index]
            return


def get_running_engines() -> list[Engine]:
    """Return the engines whose run or event is under way on this thread, each once, outermost first.

    An engine that runs between two events, in its step function or in the program's own loop, counts like one that
    fires an event.
    """
    engines = [firing.engine for firing in FIRINGS.stack]
    for num_firings, reference in reversed(FIRINGS.runs):
        engine = reference()
        if engine is not None:
            engines.insert(num_firings, engine)
    return list(dict.fromkeys(engines))


def get_enclosing_engines(engine: Engine) -> list[Engine]:
    """Return the other engines of :func:`get_running_engines`."""
    return [one for one in get_running_engines() if one is not engine]


def find_engine_handling_exception() -> Engine | None:
    """Return the innermost engine that fires EXCEPTION_RAISED on this thread; None if none does."""
    firings = (firing for firing in reversed(FIRINGS.stack) if firing.event is Events.EXCEPTION_RAISED)
    return next((firing.engine for firing in firings), None)


def after_event(engine: Engine, action: Action) -> None:
    """Run `action` after the last handler of the engine's present event; at once if the engine fires none.

    If a handler raises, the action does not run.
    """
    firing = _find_firing(engine)
    if firing is None:
        action(engine)
    elif firing.actions is None:
        firing.actions = [action]
    else:
        firing.actions.append(action)


def restore_event_name(engine: Engine) -> None:
    """Set ``last_event_name`` to the present event: a user's handler may have fired another event since."""
    firing = _find_firing(engine)
    if firing is not None:
        engine.last_event_name = firing.event


def get_early_handlers(engine: Engine) -> list[TrackedHandler]:
    """Return the handlers that may run early and that the engine's present events have not called."""
    return [one.tracked for firing in FIRINGS.stack if firing.engine is engine for one in firing.early_attachments()]


def run_early(engine: Engine, only: Collection[TrackedHandler] | None) -> None:
    """Call the handlers of :func:`get_early_handlers`, and the hook ``after_iteration``, now.

    Args:
        engine: the engine, which fires an event.
        only: the handlers to call; None for all.
    """
    for firing in [firing for firing in FIRINGS.stack if firing.engine is engine]:
        attachments = firing.early_attachments() if only is None or only else []
        if not attachments and not firing.is_iteration_due:
            continue
        present, engine.last_event_name = engine.last_event_name, firing.event
        FIRINGS.stack.append(firing)  # the handlers find it innermost, as at their own place
        try:
            for one in attachments:
                if only is None or one.tracked in only:
                    one.call_early(firing)
            firing.end_iteration()
        finally:
            FIRINGS.stack.pop()
            engine.last_event_name = present


def _find_firing(engine: Engine) -> Firing | None:
    for firing in reversed(FIRINGS.stack):
        if firing.engine is engine:
            return firing
    return None
