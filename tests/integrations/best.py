"""A Checkpoint that keeps the best models of a callback's loop, and an error before it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ignite.engine import Engine, Events

from distckpt import Checkpoint, DiskSaver


class OwnError(Exception):
    """What one rank raises."""


def keep_best(
    loop: Engine, to_save: Mapping[str, Any], folder: Path, metric: str, happens: tuple[int, str, int] | None
) -> None:
    """Save the two best models at the ends of epochs, by the loss of an evaluation.

    Args:
        loop: the callback's engine.
        to_save: the model.
        folder: the job's.
        metric: the name of the loss.
        happens: on this rank: rank, what and when. If it is "end", an epoch's end raises.
    """
    if happens is not None and happens[1] == "end":

        @loop.on(Events.EPOCH_COMPLETED(once=happens[2]))
        def fail() -> None:
            raise OwnError("own")

    best = Checkpoint(
        to_save,
        DiskSaver(folder / "best", require_empty=False),
        score_function=lambda loop: -float(loop.state.metrics[metric]),
        score_name="loss",
        n_saved=2,
    )
    loop.add_event_handler(Events.EPOCH_COMPLETED, best)
