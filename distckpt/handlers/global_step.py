"""The global step of another engine: :func:`global_step_from_engine`. Rank-local."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ignite.engine import Engine, State


def global_step_from_engine(
    engine: Engine,
    custom_event_name: Any = None,
    fallback_attr: str = "epoch",
) -> Callable[[Any, Any], int]:
    """Return a ``global_step_transform`` that reads the step of `engine`, usually the trainer.

    Args:
        engine: the engine that counts the steps.
        custom_event_name: the event whose count is the step; None for the event on which the handler is called.
        fallback_attr: attribute of the engine's state, for events without a count.

    Raises:
        TypeError: `engine` is not an Engine.

    Example:
        >>> from ignite.engine import Events
        >>> trainer = Engine(lambda engine, batch: None)
        >>> trainer.run([0, 1, 2], max_epochs=2) and None
        >>> global_step_from_engine(trainer)(None, Events.EPOCH_COMPLETED)
        2
    """
    if not isinstance(engine, Engine):
        raise TypeError(f"Argument engine should be an instance of Engine, but given {type(engine)}")

    return _EngineStep(engine, custom_event_name, fallback_attr)


@dataclass(frozen=True, slots=True, eq=False)
class _EngineStep:
    """A ``global_step_transform`` that reads a count of an engine's state."""

    engine: Engine
    custom_event_name: Any
    fallback_attr: str

    def attribute(self, event_name: Any) -> str:
        """Return the name of the state's attribute that is the step on an event."""
        event = event_name if self.custom_event_name is None else self.custom_event_name
        name: str = State.event_to_attr.get(event, self.fallback_attr)
        return name

    def __call__(self, _: Any, event_name: Any) -> int:
        step: int = getattr(self.engine.state, self.attribute(event_name))
        return step


def may_count_epochs(transform: Callable[..., Any] | None, event_name: Any) -> bool:
    """Return False if a ``global_step_transform`` is known to count something other than epochs on an event."""
    return not isinstance(transform, _EngineStep) or transform.attribute(event_name) == "epoch"
