"""The global step of another engine: :func:`global_step_from_engine`. Rank-local."""

from collections.abc import Callable
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
        msg = f"Argument engine should be an instance of Engine, but given {type(engine)}"
        raise TypeError(msg)

    def global_step(_: Any, event_name: Any) -> int:
        event = event_name if custom_event_name is None else custom_event_name
        if event in State.event_to_attr:
            return int(engine.state.get_event_attrib_value(event))
        step: int = getattr(engine.state, fallback_attr)
        return step

    return global_step
