"""Stopping a run whose numbers broke.

Owns :class:`TerminateOnNan`. Layer L5.
"""

import logging
from collections.abc import Callable
from typing import Any

from ignite.engine import Engine

from distckpt.backends.detect import current
from distckpt.consensus import agree
from distckpt.handlers.arguments import check_timeout
from distckpt.handlers.places import take_place
from distckpt.state.finite import all_finite

__all__ = ["TerminateOnNan"]


def _as_it_is(output: Any) -> Any:
    return output


class TerminateOnNan:
    """Handler that stops the run, on every rank at the same iteration, when any rank's output is NaN or infinite.

    Attach it on all ranks.

    Args:
        output_transform: takes the process function's output, returns what is looked at: a number, a tensor, a NumPy
            array, None, or a collection of them.

    Raises:
        TypeError: `output_transform` is not callable.

    Example:
        >>> from ignite.engine import Events
        >>> trainer = Engine(lambda engine, batch: float("nan") if batch == 2 else 0.0)
        >>> trainer.add_event_handler(Events.ITERATION_COMPLETED, TerminateOnNan()) and None
        >>> trainer.run([0, 1, 2, 3]).iteration
        3
    """

    def __init__(self, output_transform: Callable[[Any], Any] = _as_it_is, *, timeout_s: float | None = None) -> None:
        if not callable(output_transform):
            msg = f"Argument output_transform should be a function, but given {type(output_transform)}"
            raise TypeError(msg)
        check_timeout(timeout_s)
        self.logger = logging.getLogger(f"{__name__}.{type(self).__name__}")
        self.timeout_s = timeout_s
        self._output_transform = output_transform
        self._seat = agree.Seat(type(self).__name__)

    def __call__(self, engine: Engine) -> None:
        """Collective. One reduction when all is well.

        Raises:
            PhaseError: the output cannot be looked at on some rank; on every rank. In a world of one: a TypeError.
        """
        backend = current()
        if backend.world_size == 1:
            output = self._output_transform(engine.state.output)
            if not all_finite(output):
                self._stop(engine, output, (0,), 0)
            return
        place = take_place(self._seat, backend, engine, timeout_s=self.timeout_s)
        seen: list[Any] = []

        def is_broken() -> bool:
            seen.append(self._output_transform(engine.state.output))
            return not all_finite(seen[0])

        ranks = agree.vote(backend, place("looking for NaN"), is_broken, timeout_s=self.timeout_s)
        if ranks:
            self._stop(engine, seen[0], ranks, backend.rank)

    def _stop(self, engine: Engine, output: Any, ranks: tuple[int, ...], rank: int) -> None:
        name = type(self).__name__
        where = f"rank {', '.join(str(one) for one in ranks)}, iteration {engine.state.iteration}"
        if rank in ranks:
            self.logger.warning("%s: Output '%s' contains NaN or Inf. Stop training (%s)", name, output, where)
        else:
            self.logger.warning("%s: Output of another rank contains NaN or Inf. Stop training (%s)", name, where)
        engine.terminate()
