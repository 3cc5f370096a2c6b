"""When an event is over: what runs after the last handler of an engine's event, and around an engine's run.

Owns the hooks into ignite's Engine that a vote per event needs: which engines are firing now, and which handlers that
vote have their turn still to come. ignite has no event for "all handlers of this event have run", and none for an
exception that leaves a run.

Changed of ignite's (pytorch-ignite 0.5.5): ``Engine._fire_event``, ``Engine._handle_exception``, ``Engine.run``,
``Engine.set_data``, ``Engine.load_state_dict``, ``Engine.add_event_handler`` and ``Engine.remove_event_handler`` are
wrapped, once, as this module is imported. An engine that no handler of distckpt's is attached to behaves as before.
"""

import functools
import threading
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, ClassVar, Protocol

from ignite.engine import Engine, EventEnum, Events, State
from ignite.engine.events import EventsList

_ATTRIBUTE = "_distckpt_hooks"
_TURNS = "_distckpt_turns"
_START = "_distckpt_start"
_RUN = "_distckpt_run"
_MAX_WRAPPERS = 16  # around one handler: a wrapper may claim to wrap itself
_ITERATED = Events.ITERATION_COMPLETED  # members of an enum are slow to look up
Action = Callable[[Engine], None]
_Entry = tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]
"""What an engine's list holds: a function, and what it is called with; its first argument may refer to the engine."""


class Hooks(Protocol):
    """What an engine tells about its run; kept on the engine itself."""

    def before_event(self, engine: Engine, event: Any) -> None:
        """Called before the handlers of STARTED and of COMPLETED."""

    def after_iteration(self, engine: Engine) -> None:
        """Called once an iteration: after the handlers of ITERATION_COMPLETED, or by :func:`run_early`."""

    def after_run(self, engine: Engine) -> None:
        """Called when a run has ended without an exception."""

    def is_uncaught(self, engine: Engine) -> bool:
        """Return True if an exception leaves the run though no handler of EXCEPTION_RAISED has raised."""

    def on_exception(self, engine: Engine, error: BaseException) -> BaseException:
        """Called when an exception is about to leave the run; returns the one that is to leave it."""


class RunHooks(Protocol):
    """The run of an engine; kept on the engine itself."""

    def begin(self, engine: Engine) -> None:
        """Called before the handlers of STARTED."""


class Start(Protocol):
    """What is asked before an engine's next run; kept on the engine itself."""

    def before_run(self, engine: Engine, *args: Any, **kwargs: Any) -> State | None:
        """Called with the arguments of ``run()``; returns a state to be returned at once, or None."""


class _Counters(Protocol):
    """An engine's counters; see :class:`distckpt.handlers.progress.Progress`."""

    trained: int
    needs_iterator: bool

    def begin_pass(self) -> None:
        """Count batches from a new iterator."""


class TrackedHandler:
    """Base of the handlers whose turns an engine notes as they are attached.

    TrackedHandler then, because a profiler may replace the entries of the engine's list by functions of its own.
    """

    may_run_early: ClassVar[bool]
    """Whether its turn may come before that of the handlers attached before it."""
    detects_nan: ClassVar[bool]
    """Whether a save has to know its answer."""

    def attached(self, engine: Engine, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Called as an engine notes the handler, with what it will be called with beside the engine."""


class Attachment:
    """The turn of a noted handler on one event.

    If the handler answers early, this object replaces it in the engine's list, and calls it once a firing at most. To
    programs that look into the list it has the handler's class and attributes.

    Attributes:
        noted: the handler.
        event: the event.
        given: what was attached: the handler, or a function around it.
    """

    def __init__(self, noted: TrackedHandler, event: Any, given: Any, entry: _Entry) -> None:
        self.noted = noted
        self.event = event
        self.given = given
        self._function, self._args, self._kwargs = entry
        if hasattr(self._function, "_parent"):  # ignite's wrapper of a handler with a filter
            self._parent = self._function._parent  # noqa: SLF001 - by it ignite finds the handler

    def __eq__(self, other: object) -> bool:
        """Return True for what was attached: ignite compares so where a handler is looked for or removed."""
        return other is self or self.given == other

    __hash__ = object.__hash__

    @property  # type: ignore[misc]  # object has a setter too
    def __class__(self) -> type:
        """The handler's, for ``isinstance`` and for the names in a profile."""
        return type(self.noted)

    def __getattr__(self, name: str) -> Any:
        """Return what the handler has; nothing of what Python asks an object for itself, as for a copy."""
        if name == "noted" or name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.noted, name)

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        """Call the handler, unless its turn in the firing under way has come before."""
        stack = _FRAMES.stack
        if stack:
            had = stack[-1].had
            if id(self) in had:
                return
            had.add(id(self))
        self._function(*args, **kwargs)

    def take(self, frame: "_Frame") -> None:
        """Call the handler as the firing `frame` would."""
        frame.had.add(id(self))
        self._call(self._function, frame.engine, frame.args, frame.kwargs)

    def call_given(self, engine: Engine) -> None:
        """Call what was attached as the engine would, whatever the event's filter says."""
        self._call(self.given, engine, (), {})

    def _call(
        self, function: Callable[..., Any], engine: Engine, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        first: tuple[Any, ...] = ()
        others = self._args
        if others and isinstance(others[0], weakref.ref):
            first, others = (engine,), others[1:]
        function(*first, *args, *others, **(self._kwargs | kwargs))


class _Frame:
    """A firing under way.

    Attributes:
        engine: the engine that fires.
        event: the event that it fires.
        args: what its handlers are called with beside their own arguments.
        kwargs: the same by keyword.
        actions: what is to run after it; None for nothing.
        had: the ids of the turns that have come.
        turns: those of the event; None as long as they were not needed.
        is_iteration: whether :meth:`Hooks.after_iteration` is still to be called.
    """

    __slots__ = ("actions", "args", "engine", "event", "had", "is_iteration", "kwargs", "turns")

    def __init__(self, engine: Engine, event: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.engine = engine
        self.event = event
        self.args = args
        self.kwargs = kwargs
        self.actions: list[Action] | None = None
        self.had: set[int] = set()
        self.turns: list[Attachment] | None = None
        self.is_iteration = event is _ITERATED


class _Frames(threading.local):
    """The firings under way on this thread, outermost first."""

    def __init__(self) -> None:
        self.stack: list[_Frame] = []


_FRAMES = _Frames()  # of the thread: replicas may be threads of one process


class CheckpointEvents(EventEnum):
    """Events fired by :class:`~distckpt.Checkpoint`.

    ``SAVED_CHECKPOINT`` fires on every rank, after the checkpoint is durable and what it replaces is removed.

    Example:
        >>> engine = Engine(lambda engine, batch: None)
        >>> @engine.on(CheckpointEvents.SAVED_CHECKPOINT)
        ... def told(engine):
        ...     print("saved")
    """

    SAVED_CHECKPOINT = "saved_checkpoint"


def get_hooks(engine: Engine | None) -> Any:
    """Return what :func:`set_hooks` put on the engine, or None. A handler may be called without an engine."""
    return None if engine is None else vars(engine).get(_ATTRIBUTE)


def set_hooks(engine: Engine, hooks: Hooks) -> None:
    """Let the engine call `hooks`."""
    vars(engine)[_ATTRIBUTE] = hooks


def get_run(engine: Engine) -> Any:
    """Return what :func:`set_run` put on the engine, or None."""
    return vars(engine).get(_RUN)


def set_run(engine: Engine, run: RunHooks) -> None:
    """Let the engine say to `run` when a run begins."""
    vars(engine)[_RUN] = run


def set_start_hook(engine: Engine, start: Start | None) -> None:
    """Let the engine's next ``run()`` ask `start` first; None takes that back."""
    vars(engine)[_START] = start


def is_iteration_event(engine: Engine) -> bool:
    """Tell whether the event that the engine fires now is one of each iteration's."""
    event = engine.last_event_name
    # The usual one first: events are hashed in Python, and this runs in every iteration.
    return event is _ITERATED or (event is not None and State.event_to_attr.get(event) == "iteration")


def register_checkpoint_events(engine: Engine) -> None:
    """Make `engine` know the events. Does nothing where it does."""
    if not engine.has_registered_events(CheckpointEvents.SAVED_CHECKPOINT):
        engine.register_events(*CheckpointEvents)


def get_iterator(engine: Engine) -> Iterator[Any] | None:
    """Return the iterator over the engine's data; None if ignite is going to make a new one."""
    return engine._dataloader_iter  # noqa: SLF001 - ignite has no public name for it


def get_init_iter(engine: Engine) -> int | None:
    """Return the number of iterations behind the run's first epoch; None if ignite derives it."""
    return engine._init_iter  # noqa: SLF001 - as above


def set_init_iter(engine: Engine, iterations: int | None) -> None:
    """Set the number of iterations behind the run's first epoch."""
    engine._init_iter = iterations  # noqa: SLF001 - as above


def get_handlers(engine: Engine, event: Any) -> list[Callable[..., Any]]:
    """Return the functions attached to the engine's event, in call order."""
    return [function for function, *_ in engine._event_handlers.get(event, ())]  # noqa: SLF001 - as above


def add_first_handler(engine: Engine, event: Any, handler: Callable[..., Any]) -> None:
    """Attach a handler that runs before all others of the event."""
    engine.add_event_handler(event, handler)
    handlers = engine._event_handlers[event]  # noqa: SLF001 - as above
    handlers.insert(0, handlers.pop())


def find_attachments(engine: Engine, handler: TrackedHandler) -> list[Attachment]:
    """Return the handler's attachments to one event: the present one, else its first one."""
    present = engine.last_event_name
    events = sorted(engine._allowed_events, key=lambda event: event != present)  # noqa: SLF001 - as above
    found = ([one for one in get_attachments(engine, event) if one.noted is handler] for event in events)
    return next(filter(None, found), [])


def after_event(engine: Engine, action: Action) -> None:
    """Run `action` when the last handler of the engine's event under way has run; at once if it fires none.

    If a handler raises, the action does not run.
    """
    frame = _frame_of(engine)
    if frame is None:
        action(engine)
    elif frame.actions is None:
        frame.actions = [action]
    else:
        frame.actions.append(action)


def restore_event_name(engine: Engine) -> None:
    """Let the engine tell the event under way as its last one, though a handler of the user's has fired another since.

    ignite's engine goes on telling that other one.
    """
    frame = _frame_of(engine)
    if frame is not None:
        engine.last_event_name = frame.event


def find_engine_handling_exception() -> Engine | None:
    """Return the engine that fires EXCEPTION_RAISED on this thread, the innermost of several; None if none does."""
    for frame in reversed(_FRAMES.stack):
        if frame.event is Events.EXCEPTION_RAISED:
            return frame.engine
    return None


def get_firing_engines() -> list[Engine]:
    """Return the engines that are firing an event on this thread, outermost first."""
    return [frame.engine for frame in _FRAMES.stack]


def get_attachments(engine: Engine, event: Any) -> list[Attachment]:
    """Return the turns of the noted handlers on the engine's event, in their order."""
    turns: list[Attachment] = vars(engine).get(_TURNS, {}).get(event, [])
    return turns


def get_tracked_handlers(engine: Engine) -> list[TrackedHandler]:
    """Return the noted handlers of the engine, each once, in the order in which its events got their first."""
    turns = [turn for of_event in vars(engine).get(_TURNS, {}).values() for turn in of_event]
    return list({id(turn.noted): turn.noted for turn in turns}.values())


def get_early_handlers(engine: Engine) -> list[TrackedHandler]:
    """Return the handlers that answer early and have not been called yet in the events that the engine fires now."""
    return [turn.noted for frame in _FRAMES.stack if frame.engine is engine for turn in _to_come(frame)]


def run_early(engine: Engine, only: Collection[TrackedHandler] | None) -> None:
    """Call handlers that :func:`get_early_handlers` yields, and :meth:`Hooks.after_iteration`, now.

    Args:
        engine: the engine that fires.
        only: which ones; None for all.
    """
    for frame in [frame for frame in _FRAMES.stack if frame.engine is engine]:
        turns = _to_come(frame) if only is None or only else []
        if not turns and not frame.is_iteration:
            continue
        present, engine.last_event_name = engine.last_event_name, frame.event
        _FRAMES.stack.append(frame)  # so that it is the innermost event of the engine, as in a turn at its place
        try:
            for turn in turns:
                if only is None or turn.noted in only:
                    turn.take(frame)
            _end_iteration(frame)
        finally:
            _FRAMES.stack.pop()
            engine.last_event_name = present


def _to_come(frame: _Frame) -> list[Attachment]:
    if frame.turns is None:
        frame.turns = get_attachments(frame.engine, frame.event)
    return [turn for turn in frame.turns if id(turn) not in frame.had and turn.noted.may_run_early]


def _frame_of(engine: Engine) -> _Frame | None:
    """Return the innermost firing of the engine."""
    for frame in reversed(_FRAMES.stack):
        if frame.engine is engine:
            return frame
    return None


def _end_iteration(frame: _Frame) -> None:
    if frame.is_iteration:
        frame.is_iteration = False
        hooks = get_hooks(frame.engine)
        if hooks is not None:
            hooks.after_iteration(frame.engine)


def _at_border_of_run(engine: Engine, event: Any) -> None:
    run = get_run(engine)
    if run is not None and event is Events.STARTED:
        run.begin(engine)
    hooks = get_hooks(engine)
    if hooks is not None:
        hooks.before_event(engine, event)


def _wrap_fire_event(
    fire: Callable[..., None],
    progress_of: Callable[[Engine], _Counters],
    count_event: Callable[[Engine, Any], None],
) -> Callable[..., None]:
    frames = _FRAMES
    drawing, drawn, begun = Events.GET_BATCH_STARTED, Events.GET_BATCH_COMPLETED, Events.ITERATION_STARTED

    @functools.wraps(fire)
    def fire_event(self: Engine, event_name: Any, *event_args: Any, **event_kwargs: Any) -> None:
        if event_name is _ITERATED:
            progress_of(self).trained = self.state.iteration
        elif event_name is drawn:
            progress_of(self).needs_iterator = False
        elif not (event_name is drawing or event_name is begun):  # not of each iteration
            count_event(self, event_name)
            if event_name is Events.STARTED or event_name is Events.COMPLETED:
                _at_border_of_run(self, event_name)
        stack = frames.stack
        frame = _Frame(self, event_name, event_args, event_kwargs)
        stack.append(frame)
        try:
            fire(self, event_name, *event_args, **event_kwargs)
            if frame.is_iteration:
                _end_iteration(frame)
        finally:
            stack.pop()
        if frame.actions is not None:
            self.last_event_name = event_name
            for action in frame.actions:
                action(self)

    return fire_event


def _wrap_add_event_handler(add: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(add)
    def add_and_note(self: Engine, event_name: Any, handler: Any, *args: Any, **kwargs: Any) -> Any:
        handle = add(self, event_name, handler, *args, **kwargs)
        noted = _noted_in(handler)
        if noted is not None and not isinstance(event_name, EventsList):  # of a list each one comes here too
            handlers = self._event_handlers[event_name]
            event = next(one for one in self._allowed_events if one == event_name)  # without a filter
            turn = Attachment(noted, event, handler, handlers[-1])
            if noted.may_run_early:
                handlers[-1] = (turn, *handlers[-1][1:])
            vars(self).setdefault(_TURNS, {}).setdefault(event, []).append(turn)
            noted.attached(self, args, kwargs)
        return handle

    return add_and_note


def _noted_in(handler: Any) -> TrackedHandler | None:
    """Return the handler that is called where `handler` is: itself, or what it is a plain wrapper of."""
    for _ in range(_MAX_WRAPPERS):
        if isinstance(handler, TrackedHandler):
            return handler
        if isinstance(handler, functools.partial):
            handler = handler.func
        elif getattr(handler, "__name__", None) == "__call__":
            handler = getattr(handler, "__self__", None)
        else:
            handler = getattr(handler, "__wrapped__", None)
    return None


def _wrap_remove_event_handler(remove: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(remove)
    def remove_and_forget(self: Engine, handler: Any, event_name: Any) -> None:
        remove(self, handler, event_name)
        turns = get_attachments(self, event_name)
        turns[:] = [turn for turn in turns if turn.given != handler]

    return remove_and_forget


def _wrap_handle_exception(handle: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(handle)
    def handle_exception(self: Engine, error: BaseException) -> None:
        try:
            handle(self, error)
            hooks = self.__dict__.get(_ATTRIBUTE)
            if hooks is not None and hooks.is_uncaught(self):
                raise error  # noqa: TRY301 - it leaves as one that a handler raises
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
        start = self.__dict__.get(_START)
        if start is not None:
            state = start.before_run(self, *args, **kwargs)
            if state is not None:
                return state
        state = run(self, *args, **kwargs)
        hooks = self.__dict__.get(_ATTRIBUTE)
        if hooks is not None:
            hooks.after_run(self)
        return state

    return run_and_tell


def _wrap_load_state_dict(load: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(load)
    def load_state_dict(self: Engine, state_dict: Any) -> None:
        # Of a first epoch over data without a length; ignite derives the epoch from the iteration and the length.
        is_stream = isinstance(state_dict, Mapping) and "epoch" not in state_dict
        iteration = state_dict.get("iteration") if is_stream and state_dict.get("epoch_length", 0) is None else None
        if not iteration:
            load(self, state_dict)
            return
        load(self, {**state_dict, "iteration": 0})
        self.state.iteration = iteration

    return load_state_dict


def _wrap_set_data(set_data: Callable[..., None], progress_of: Callable[[Engine], _Counters]) -> Callable[..., None]:
    @functools.wraps(set_data)
    def set_data_and_count(self: Engine, data: Any) -> None:
        set_data(self, data)
        progress_of(self).begin_pass()

    return set_data_and_count


def _wrap_assert_allowed_event(check: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(check)
    def register_and_check(self: Engine, event_name: Any) -> None:
        # A Checkpoint knows its engine from its first event on only; listeners may be attached before.
        if getattr(event_name, "value", None) == CheckpointEvents.SAVED_CHECKPOINT.value:
            register_checkpoint_events(self)
        check(self, event_name)

    return register_and_check


def install(progress_of: Callable[[Engine], _Counters], count_event: Callable[[Engine, Any], None]) -> None:
    """Wrap ignite's methods, unless they are wrapped already.

    Args:
        progress_of: returns an engine's counters; see :mod:`distckpt.handlers.progress`, which imports this module.
        count_event: counts an event that does not occur in each iteration.
    """
    wrappers: dict[str, Callable[[Callable[..., Any]], Callable[..., Any]]] = {
        "_assert_allowed_event": _wrap_assert_allowed_event,
        "_fire_event": lambda fire: _wrap_fire_event(fire, progress_of, count_event),
        "_handle_exception": _wrap_handle_exception,
        "run": _wrap_run,
        "load_state_dict": _wrap_load_state_dict,
        "set_data": lambda set_data: _wrap_set_data(set_data, progress_of),
        "add_event_handler": _wrap_add_event_handler,
        "remove_event_handler": _wrap_remove_event_handler,
    }
    for name, wrap in wrappers.items():
        function = getattr(Engine, name)
        if not getattr(function, _ATTRIBUTE, False):
            wrapped = wrap(function)
            setattr(wrapped, _ATTRIBUTE, True)
            setattr(Engine, name, wrapped)
