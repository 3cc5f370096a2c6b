"""When an event is over: what runs after the last handler of an engine's event, and around an engine's run.

Owns the hooks into ignite's Engine that a vote per event needs, and which engines are firing now. ignite has no
event for "all handlers of this event have run", and none for an exception that leaves a run. Layer L5.

Changed of ignite's (pytorch-ignite 0.5.5): ``Engine._fire_event``, ``Engine._handle_exception`` and ``Engine.run`` are
wrapped, once, as this module is imported. An engine that no handler of distckpt's is attached to behaves as before.
"""

import functools
import threading
from collections.abc import Callable
from typing import Any, Protocol

from ignite.engine import Engine, Events

__all__ = ["Hooks", "after_event", "engines_firing", "hooks_of", "return_to_event", "set_hooks"]

_ATTRIBUTE = "_distckpt_hooks"
Action = Callable[[Engine], None]


class Hooks(Protocol):
    """What an engine tells about its run; kept on the engine itself."""

    def before_event(self, engine: Engine, event: Any) -> None:
        """Called before the handlers of STARTED and of COMPLETED."""

    def after_iteration(self, engine: Engine) -> None:
        """Called after the handlers of ITERATION_COMPLETED, and before what :func:`after_event` is given."""

    def after_run(self, engine: Engine) -> None:
        """Called when a run has ended without an exception."""

    def on_exception(self, engine: Engine, error: BaseException) -> BaseException:
        """Called when an exception is about to leave the run; returns the one that is to leave it."""


class _Frame:
    """A firing under way.

    Attributes:
        engine: whose.
        event: which one.
        actions: what is to run after it; None for nothing.
        last: and what after that.
    """

    __slots__ = ("actions", "engine", "event", "last")

    def __init__(self, engine: Engine, event: Any) -> None:
        self.engine = engine
        self.event = event
        self.actions: list[Action] | None = None
        self.last: list[Action] = _NOTHING


class _Frames(threading.local):
    """The firings under way on this thread, outermost first."""

    def __init__(self) -> None:
        self.stack: list[_Frame] = []


_NOTHING: list[Action] = []
_FRAMES = _Frames()  # of the thread: replicas may be threads of one process


def hooks_of(engine: Engine | None) -> Any:
    """Return what :func:`set_hooks` put on the engine, or None. A handler may be called without an engine."""
    return None if engine is None else vars(engine).get(_ATTRIBUTE)


def set_hooks(engine: Engine, hooks: Hooks) -> None:
    """Let the engine call `hooks`."""
    vars(engine)[_ATTRIBUTE] = hooks


def after_event(engine: Engine, action: Action, *, is_last: bool = False) -> None:
    """Run `action` when the last handler of the engine's event under way has run; at once if it fires none.

    If a handler raises, the action does not run.

    Args:
        engine: whose event.
        action: what to run, with the engine.
        is_last: after all the other actions.
    """
    for frame in reversed(_FRAMES.stack):
        if frame.engine is engine:
            if frame.actions is None:
                frame.actions, frame.last = [], []
            (frame.last if is_last else frame.actions).append(action)
            return
    action(engine)


def return_to_event(engine: Engine) -> None:
    """Let the engine tell the event under way as its last one, though a handler of the user's has fired another since.

    ignite's engine goes on telling that other one.
    """
    for frame in reversed(_FRAMES.stack):
        if frame.engine is engine:
            engine.last_event_name = frame.event
            return


def engines_firing() -> list[Engine]:
    """Return the engines that are firing an event on this thread, outermost first."""
    return [frame.engine for frame in _FRAMES.stack]


def _wrap_fire_event(fire: Callable[..., None]) -> Callable[..., None]:
    started, completed, iterated, frames = Events.STARTED, Events.COMPLETED, Events.ITERATION_COMPLETED, _FRAMES

    @functools.wraps(fire)
    def fire_event(self: Engine, event_name: Any, *event_args: Any, **event_kwargs: Any) -> None:
        if event_name is started or event_name is completed:
            hooks = self.__dict__.get(_ATTRIBUTE)
            if hooks is not None:
                hooks.before_event(self, event_name)
        stack = frames.stack
        frame = _Frame(self, event_name)
        stack.append(frame)
        try:
            fire(self, event_name, *event_args, **event_kwargs)
            if event_name is iterated:
                hooks = self.__dict__.get(_ATTRIBUTE)
                if hooks is not None:
                    hooks.after_iteration(self)
        finally:
            stack.pop()
        if frame.actions is not None:
            self.last_event_name = event_name
            for action in (*frame.actions, *frame.last):
                action(self)

    return fire_event


def _wrap_handle_exception(handle: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(handle)
    def handle_exception(self: Engine, error: BaseException) -> None:
        try:
            handle(self, error)
        except BaseException as raised:
            hooks = self.__dict__.get(_ATTRIBUTE)
            leaving = raised if hooks is None else hooks.on_exception(self, raised)
            if leaving is raised:
                raise
            raise leaving  # noqa: B904 - it has a cause of its own, on another rank; this one is its context

    return handle_exception


def _wrap_run(run: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(run)
    def run_and_tell(self: Engine, *args: Any, **kwargs: Any) -> Any:
        state = run(self, *args, **kwargs)
        hooks = self.__dict__.get(_ATTRIBUTE)
        if hooks is not None:
            hooks.after_run(self)
        return state

    return run_and_tell


def _hook_in() -> None:
    for name, wrap in (
        ("_fire_event", _wrap_fire_event),
        ("_handle_exception", _wrap_handle_exception),
        ("run", _wrap_run),
    ):
        function = getattr(Engine, name)
        if not getattr(function, _ATTRIBUTE, False):
            wrapped = wrap(function)
            setattr(wrapped, _ATTRIBUTE, True)
            setattr(Engine, name, wrapped)


_hook_in()
