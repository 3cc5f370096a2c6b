"""Where in a run a handler is called: an engine's event as the ranks compare it.

Owns the translation from ignite's engine to :class:`~distckpt.coordination.phases.Place`.
"""

from collections.abc import Callable

from ignite.engine import Engine, Events, State

from distckpt.backends.base import Backend
from distckpt.coordination.phases import Place, Seat

__all__ = ["counts_iterations", "take_place"]

_ITERATED = Events.ITERATION_COMPLETED


def counts_iterations(engine: Engine) -> bool:
    """Tell whether the event that the engine fires now is one of each iteration's."""
    event = engine.last_event_name
    # The usual one first: events are hashed in Python, and this runs in every iteration.
    return event is _ITERATED or (event is not None and State.event_to_attr.get(event) == "iteration")


def take_place(
    seat: Seat,
    backend: Backend,
    engine: Engine | None,
    *,
    watch: str | None = None,
    timeout_s: float | None = None,
) -> Callable[[str], Place]:
    """All ranks. Take the handler's seat for this call, and return what makes its places.

    Ranks have to be at the same iteration on events that count iterations. On others only the number of calls has to
    agree: at the end of an evaluation the ranks may have seen shards of unequal length.

    Args:
        seat: the handler's.
        backend: the job's.
        engine: on which the handler is called; None when a user calls it.
        watch: see :meth:`Seat.take`.
        timeout_s: seconds to wait for the other ranks; None for the default.

    Returns:
        Makes a place from what is done there.
    """
    who, turn = seat.take(backend, watch=watch, timeout_s=timeout_s)
    if engine is None:
        return lambda doing: Place(who=who, doing=doing, step=0, turn=turn)
    event, step = engine.last_event_name, engine.state.iteration
    name = getattr(event, "name", event)
    if counts_iterations(engine):
        turn = step
    return lambda doing: Place(who=who, doing=f"on {name}, {doing}", step=step, turn=turn)
