"""Hooks into ignite's engine, and access to its private names.

distckpt needs to know when the last handler of an event has run, which engines run on this thread, which voting
handlers an event has still to call, and which exception leaves a run. ignite has no events for these, so
:func:`install` wraps methods of ``Engine``, once, when :mod:`distckpt.handlers` is imported. An engine without handlers
of distckpt behaves as before.

``tests/unit/handlers/test_ignite_hooks.py`` checks each name, signature and statement of ignite that this module,
:mod:`distckpt.handlers.stepped_engine` and :mod:`distckpt.handlers.idist_bridge` rely on. The bridge is a module of its
own since it concerns ``ignite.distributed`` and metrics, not engines.
"""

import functools
import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from ignite.engine import DeterministicEngine, Engine, EventEnum, Events, State
from ignite.engine.deterministic import _set_rng_states
from ignite.engine.events import EventsList

from distckpt.handlers.engine_events import (
    ATTACHMENTS,
    FIRINGS,
    HOOKS,
    START_HOOK,
    Attachment,
    Firing,
    KeepsEventName,
    TrackedHandler,
    enter_run,
    get_attachments,
    get_hooks,
    get_run,
    leave_run,
)

_MAX_WRAPPERS = 16  # around one handler: a wrapper may say that it wraps itself
_ITERATION_STARTED, _ITERATION_COMPLETED = Events.ITERATION_STARTED, Events.ITERATION_COMPLETED  # slow to look up


class CheckpointEvents(EventEnum):
    """Events fired by :class:`~distckpt.Checkpoint`.

    ``SAVED_CHECKPOINT`` fires on every rank, after the checkpoint is durable and the files it replaces are removed.

    Example:
        >>> engine = Engine(lambda engine, batch: None)
        >>> @engine.on(CheckpointEvents.SAVED_CHECKPOINT)
        ... def report(engine):
        ...     print("saved")
    """

    SAVED_CHECKPOINT = "saved_checkpoint"


def get_iterator(engine: Engine) -> Iterator[Any] | None:
    """Return the iterator over the engine's data; None if ignite will make a new one."""
    return engine._dataloader_iter  # noqa: SLF001 - ignite has no public name; so below


def get_init_iter(engine: Engine) -> int | None:
    """Return how many iterations of the run's first epoch are done; None if ignite derives the number."""
    return engine._init_iter  # noqa: SLF001


def set_init_iter(engine: Engine, num_iterations: int | None) -> None:
    """Set how many iterations of the run's first epoch are done."""
    engine._init_iter = num_iterations  # noqa: SLF001


def expect_run(engine: Engine) -> None:
    """Let the engine's next run fire STARTED though its state is that of a complete run: ignite would reset it."""
    vars(engine)["_is_done"] = lambda _state: False


def end_expectation(engine: Engine) -> None:
    """Reverse :func:`expect_run`: let the engine find out itself whether its run is complete."""
    vars(engine).pop("_is_done", None)


def take_rng_states(engine: Engine) -> Any:
    """Return the generators' states that a DeterministicEngine would set with its new iterator; it then sets none.

    None for other engines, and if there are no states.
    """
    if not isinstance(engine, DeterministicEngine):
        return None
    states = getattr(engine.state, "rng_states", None)
    setattr(engine.state, "rng_states", None)  # noqa: B010 - State does not declare the attribute
    return states


def set_rng_states(states: Any) -> None:
    """Set the generators as a DeterministicEngine does."""
    _set_rng_states(states)


def get_handlers(engine: Engine, event: Any) -> list[Callable[..., Any]]:
    """Return the functions attached to the engine's event, in call order."""
    return [function for function, *_ in engine._event_handlers.get(event, ())]  # noqa: SLF001


def add_first_handler(engine: Engine, event: Any, handler: Callable[..., Any]) -> None:
    """Attach a handler that runs before the event's other handlers."""
    engine.add_event_handler(event, handler)
    handlers = engine._event_handlers[event]  # noqa: SLF001
    handlers.insert(0, handlers.pop())


def find_attachments(engine: Engine, handler: TrackedHandler) -> list[Attachment]:
    """Return the handler's attachments to one event: the present event, else the first one that has any."""
    present = engine.last_event_name
    events = sorted(engine._allowed_events, key=lambda event: event != present)  # noqa: SLF001
    found = ([one for one in get_attachments(engine, event) if one.tracked is handler] for event in events)
    return next(filter(None, found), [])


def register_checkpoint_events(engine: Engine) -> None:
    """Register :class:`CheckpointEvents` on the engine, unless it knows them."""
    if not engine.has_registered_events(CheckpointEvents.SAVED_CHECKPOINT):
        engine.register_events(*CheckpointEvents)


def _find_tracked_handler(handler: Any) -> TrackedHandler | None:
    """Return the handler that a call of `handler` calls: itself, or the callable that it plainly wraps."""
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


def install(progress_of: Callable[[Engine], Any], count_event: Callable[[Engine, Any], None]) -> None:
    """Wrap ignite's methods, unless they are wrapped already.

    Args:
        progress_of: returns an engine's :class:`~distckpt.handlers.progress.Progress`. That module imports this one,
            so its functions come as arguments.
        count_event: counts an event that does not occur in each iteration, or one of a pass's first batch.
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
        if not getattr(function, HOOKS, False):
            wrapped = functools.wraps(function)(wrap(function))
            setattr(wrapped, HOOKS, True)
            setattr(Engine, name, wrapped)


def _wrap_assert_allowed_event(check: Callable[..., None]) -> Callable[..., None]:
    def assert_allowed_event(self: Engine, event_name: Any) -> None:
        # Before its first event a Checkpoint does not know its engine, but listeners may be attached by then.
        if getattr(event_name, "value", None) == CheckpointEvents.SAVED_CHECKPOINT.value:
            register_checkpoint_events(self)
        check(self, event_name)

    return assert_allowed_event


def _wrap_fire_event(
    fire: Callable[..., None],
    progress_of: Callable[[Engine], Any],
    count_event: Callable[[Engine, Any], None],
) -> Callable[..., None]:
    get_started, get_completed = Events.GET_BATCH_STARTED, Events.GET_BATCH_COMPLETED
    firings = FIRINGS

    def fire_event(self: Engine, event_name: Any, *event_args: Any, **event_kwargs: Any) -> None:
        is_frequent = True
        if event_name is _ITERATION_COMPLETED:
            progress_of(self).trained = self.state.iteration
        elif event_name is get_completed or event_name is get_started:
            if progress_of(self).awaits_batch:  # the first one of a pass
                count_event(self, event_name)
        elif event_name is not _ITERATION_STARTED:  # does not occur in each iteration
            is_frequent = False
            count_event(self, event_name)
            _before_run_event(self, event_name)
        if is_frequent and _is_idle(self, event_name):
            self.last_event_name = event_name  # all that ignite would do
            return
        stack = firings.stack
        firing = Firing(self, event_name, event_args, event_kwargs)
        stack.append(firing)
        try:
            fire(self, event_name, *event_args, **event_kwargs)
            if firing.is_iteration_due:
                firing.end_iteration()
        finally:
            stack.pop()
        for action in firing.actions or ():
            self.last_event_name = event_name  # handlers may have fired others
            action(self)
        if isinstance(self, KeepsEventName):
            self.last_event_name = event_name

    return fire_event


def _is_idle(engine: Engine, event: Any) -> bool:
    """Return True if an event changes nothing but ``last_event_name``: no handler, no poller, no line in the log."""
    if engine._event_handlers[event] or engine.logger.isEnabledFor(logging.DEBUG):  # noqa: SLF001
        return False
    return event is not _ITERATION_COMPLETED or get_hooks(engine) is None


def _before_run_event(engine: Engine, event: Any) -> None:
    if not (event is Events.STARTED or event is Events.COMPLETED):
        return
    run, hooks = get_run(engine), get_hooks(engine)
    if run is not None and event is Events.STARTED:
        run.begin(engine)
    if hooks is not None:
        hooks.before_event(engine, event)


def _wrap_add_event_handler(add: Callable[..., Any]) -> Callable[..., Any]:
    def add_event_handler(self: Engine, event_name: Any, handler: Any, *args: Any, **kwargs: Any) -> Any:
        handle = add(self, event_name, handler, *args, **kwargs)
        tracked = _find_tracked_handler(handler)
        if tracked is not None and not isinstance(event_name, EventsList):  # ignite adds each event of a list here
            handlers = self._event_handlers[event_name]
            event = next(one for one in self._allowed_events if one == event_name)  # without a filter
            attachment = Attachment(tracked, event, handler, handlers[-1])
            if hasattr(handlers[-1][0], "_parent"):  # ignite's wrapper of a handler with a filter
                vars(attachment)["_parent"] = handlers[-1][0]._parent  # noqa: SLF001 - ignite finds the handler by it
            if tracked.may_run_early:
                handlers[-1] = (attachment, *handlers[-1][1:])
            vars(self).setdefault(ATTACHMENTS, {}).setdefault(event, []).append(attachment)
            tracked.on_attach(self, args, kwargs)
        return handle

    return add_event_handler


def _wrap_remove_event_handler(remove: Callable[..., None]) -> Callable[..., None]:
    def remove_event_handler(self: Engine, handler: Any, event_name: Any) -> None:
        remove(self, handler, event_name)
        attachments = get_attachments(self, event_name)
        attachments[:] = [one for one in attachments if one.original != handler]

    return remove_event_handler


def _wrap_handle_exception(handle: Callable[..., None]) -> Callable[..., None]:
    def handle_exception(self: Engine, error: BaseException) -> None:
        try:
            handle(self, error)
            hooks = get_hooks(self)
            if hooks is not None and hooks.is_uncaught(self):
                raise error  # noqa: TRY301 - it leaves as one that a handler raises
        except BaseException as raised:
            hooks = get_hooks(self)
            leaving = raised if hooks is None else hooks.on_exception(self, raised)
            if leaving is raised:
                raise
            raise leaving  # noqa: B904 - its cause is on another rank; `raised` is its context

    return handle_exception


def _wrap_run(run: Callable[..., Any]) -> Callable[..., Any]:
    def run_with_hooks(self: Engine, *args: Any, **kwargs: Any) -> Any:
        state = before_run(self, *args, **kwargs)
        if state is not None:
            return state
        try:
            enter_run(self)
            try:
                state = run(self, *args, **kwargs)
            finally:
                leave_run(self)
            after_run(self)
        except BaseException as raised:
            end_run(self, raised)
            raise
        end_run(self, None)
        return state

    return run_with_hooks


def before_run(engine: Engine, *args: Any, **kwargs: Any) -> State | None:
    """Prepare a run with the arguments of ``Engine.run()``; return the state if there is nothing to run."""
    start = vars(engine).get(START_HOOK)
    state: State | None = None if start is None else start.before_run(engine, *args, **kwargs)
    return state


def after_run(engine: Engine) -> None:
    """Call the hook ``after_run``, at the end of a run without an error."""
    hooks = get_hooks(engine)
    if hooks is not None:
        hooks.after_run(engine)


def end_run(engine: Engine, error: BaseException | None) -> None:
    """Note that a run ends, with an error or without one (None)."""
    found = get_run(engine)
    if found is not None:
        found.end(engine, error)


def _wrap_load_state_dict(load: Callable[..., None]) -> Callable[..., None]:
    def load_state_dict(self: Engine, state_dict: Any) -> None:
        # ignite derives the epoch from iteration and length, and fails in a first epoch over data without a length.
        is_stream = isinstance(state_dict, Mapping) and "epoch" not in state_dict
        iteration = state_dict.get("iteration") if is_stream and state_dict.get("epoch_length", 0) is None else None
        if not iteration:
            load(self, state_dict)
            return
        load(self, {**state_dict, "iteration": 0})
        self.state.iteration = iteration

    return load_state_dict


def _wrap_set_data(set_data: Callable[..., None], progress_of: Callable[[Engine], Any]) -> Callable[..., None]:
    def set_data_and_count(self: Engine, data: Any) -> None:
        set_data(self, data)
        progress_of(self).begin_pass()

    return set_data_and_count
