"""Who votes on the event that an engine fires now, and whether NaN is looked for on it.

Owns the look into ignite's list of handlers. Rank-local; issues no collectives. Layer L5.
"""

import weakref
from collections.abc import Iterator
from typing import Any

from ignite.engine import Engine

from distckpt.consensus.step_vote import Fact
from distckpt.handlers.firing import engines_firing, hooks_of
from distckpt.handlers.voting import Voter

__all__ = ["engine_that_looks_for_nan", "nan_is_looked_for", "nan_is_looked_for_later", "others_vote"]


def others_vote(me: Voter, engine: Engine) -> bool:
    """Tell whether another handler votes on the event that the engine fires now. Rank-local."""
    vote = hooks_of(engine)
    if vote is not None and vote.is_scheduled:
        return True
    return engine in engines_firing() and any(voter is not me for voter in _voters_on(engine))


def nan_is_looked_for_later(me: Voter, engine: Engine) -> bool:
    """Tell whether NaN is looked for on the event that the engine fires now, but only after `me` has run."""
    is_later = is_known = False
    for voter in _voters_on(engine) if engine in engines_firing() else ():
        is_known = is_known or voter is me
        is_later = is_later or (voter.fact is Fact.NAN and is_known)
    return is_later or (not is_known and nan_is_looked_for(engine))


def nan_is_looked_for(engine: Engine) -> bool:
    """Tell whether NaN is looked for on the event that the engine fires now. Rank-local."""
    return engine in engines_firing() and any(voter.fact is Fact.NAN for voter in _voters_on(engine))


def engine_that_looks_for_nan(engine: Engine) -> Engine | None:
    """Return the outermost engine around `engine` that fires an event on which NaN is looked for. Rank-local."""
    return next((one for one in engines_firing() if one is not engine and nan_is_looked_for(one)), None)


def _voters_on(engine: Engine) -> Iterator[Voter]:
    """Yield the handlers that vote on the event that the engine fires now, in their order."""
    for handler, *_ in engine._event_handlers.get(engine.last_event_name, ()):  # noqa: SLF001 - no public list of them
        inner = _unwrapped(handler)
        if isinstance(inner, Voter):
            yield inner


def _unwrapped(handler: Any) -> Any:
    """Return the handler inside the wrapper that ignite puts around one with an event filter, or a method's object."""
    parent = getattr(handler, "_parent", None)
    handler = parent() if isinstance(parent, weakref.ref) else handler
    return getattr(handler, "__self__", handler)
