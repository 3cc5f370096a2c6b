"""The event that tells of a saved checkpoint.

Owns :class:`CheckpointEvents` and that every engine knows it.
"""

import functools
from typing import Any

from ignite.engine import Engine, EventEnum

__all__ = ["CheckpointEvents", "register"]


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


def register(engine: Engine) -> None:
    """Make `engine` know the events. Does nothing where it does."""
    if not engine.has_registered_events(CheckpointEvents.SAVED_CHECKPOINT):
        engine.register_events(*CheckpointEvents)


def _teach_engines() -> None:
    """Let ``engine.on(Checkpoint.SAVED_CHECKPOINT)`` work before the first save, as its documentation shows it.

    An engine refuses a listener for an event that nobody has registered on it, and a Checkpoint does not know its
    engine before its first event. So the engine's own check registers ours when it is asked about it. This is the
    only thing of ignite's that distckpt changes (pytorch-ignite 0.5.5, ``Engine._assert_allowed_event``).
    """
    check = Engine._assert_allowed_event  # noqa: SLF001 - there is no public hook
    if getattr(check, "_knows_distckpt", False):
        return

    @functools.wraps(check)
    def check_and_register(self: Engine, event_name: Any) -> None:
        if getattr(event_name, "value", None) == CheckpointEvents.SAVED_CHECKPOINT.value:
            register(self)
        check(self, event_name)

    check_and_register._knows_distckpt = True  # type: ignore[attr-defined]  # noqa: SLF001 - so that it is done once
    Engine._assert_allowed_event = check_and_register  # type: ignore[method-assign]  # noqa: SLF001


_teach_engines()
