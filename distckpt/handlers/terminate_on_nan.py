"""Stopping a run whose numbers broke.

Owns :class:`TerminateOnNan`.
"""

import logging
from collections.abc import Callable, Mapping
from typing import Any

from ignite.engine import Engine

from distckpt._messages import log_level
from distckpt.backends.detect import current
from distckpt.coordination.phases import Seat
from distckpt.coordination.votes import Answer, Fact, Pending
from distckpt.handlers.arguments import check_timeout
from distckpt.handlers.engine_votes import Voter, check_schedule, mark_nonfinite, stop_reason, stop_run
from distckpt.handlers.finite import all_finite, first_offender, nonfinite_flag
from distckpt.handlers.on_its_way import PendingFlag

__all__ = ["TerminateOnNan"]


def _as_it_is(output: Any) -> Any:
    return output


class TerminateOnNan(Voter):
    """Handler that stops the run, on every rank at the same iteration, when any rank's output is NaN or infinite.

    Attach it on all ranks. It shares one reduction an event with all handlers that vote. The step is not saved: a
    :class:`~distckpt.Checkpoint` on the same event has the vote held before it saves, in every order of the two.

    Args:
        output_transform: takes the process function's output, returns what is looked at: a number, a tensor, a NumPy
            array, None, or a collection of them, nested at will. Where a save on the event comes first, it is called
            before the handlers between the two: it should look at the output alone.
        lag: 0 to stop in the iteration whose output is broken; 1 to stop one iteration later, the same one on every
            rank, and let the reduction run beside that iteration: nothing waits for an accelerator then.
        every: hold the vote on each so-many-th iteration only; the outputs between are looked at all the same.
        timeout_s: seconds to wait for the other ranks; None for ``DISTCKPT_TIMEOUT_S``, or 300.

    Raises:
        TypeError: `output_transform` is not callable.
        ValueError: `lag` or `every` makes no sense.

    Example:
        >>> from ignite.engine import Events
        >>> trainer = Engine(lambda engine, batch: float("nan") if batch == 2 else 0.0)
        >>> trainer.add_event_handler(Events.ITERATION_COMPLETED, TerminateOnNan()) and None
        >>> trainer.run([0, 1, 2, 3]).iteration
        3
    """

    fact = Fact.NAN
    detects_nan = True

    def __init__(
        self,
        output_transform: Callable[[Any], Any] = _as_it_is,
        *,
        lag: int | None = None,
        every: int | None = None,
        timeout_s: float | None = None,
    ) -> None:
        if not callable(output_transform):
            msg = f"Argument output_transform should be a function, but given {type(output_transform)}"
            raise TypeError(msg)
        check_schedule(lag, every)
        check_timeout(timeout_s)
        self.lag = lag
        self.every = every
        self.timeout_s = timeout_s
        self.logger = logging.getLogger(f"{__name__}.{type(self).__name__}")
        self._output_transform = output_transform
        self._broken: Any = None
        self._handler_id = Seat(type(self).__name__)

    def __call__(self, engine: Engine) -> None:
        """Collective, when the event is over: one reduction with all handlers that vote.

        Raises:
            RemoteRankError: the output cannot be looked at on some rank; on every rank. In a world of one: a TypeError.
        """
        backend = current()
        if backend.world_size == 1 and not self.lag:
            output = self._output_transform(engine.state.output)
            if not all_finite(output):
                self._stop(engine, output, {0: self._describe(engine.state.iteration, output)}, 0)
            return
        self._vote(engine, backend)

    def _probe(self, engine: Engine) -> Answer:
        output = self._output_transform(engine.state.output)
        if self.lag or current().takes_lazy_numbers:
            is_broken: Any = nonfinite_flag(output)
        else:
            is_broken = not all_finite(output)
        if is_broken is False:
            return None
        step = engine.state.iteration

        def describe() -> str:
            self._broken = output
            return self._describe(step, output)

        return describe if is_broken is True else Pending(PendingFlag(is_broken), describe)

    def _act(self, engine: Engine, said: Mapping[int, Any]) -> None:
        output, self._broken = self._broken, None
        self._stop(engine, output, said, current().rank)

    @staticmethod
    def _describe(step: int, output: Any) -> str:
        return f"iteration {step}: {first_offender(output) or 'it has been overwritten since'}"

    def _stop(self, engine: Engine, output: Any, said: Mapping[int, Any], rank: int) -> None:
        name = type(self).__name__
        where = "; ".join(f"rank {one}, {told}" for one, told in said.items())
        # With a lag the iteration after a NaN may have one too: the run is stopped already.
        level = logging.DEBUG if stop_reason(engine) == "nan" else log_level(rank, {0, *said})
        if rank in said:
            self.logger.log(level, "%s: Output '%s' contains NaN or Inf. Stop training (%s)", name, output, where)
        else:
            self.logger.log(level, "%s: Output of another rank contains NaN or Inf. Stop training (%s)", name, where)
        mark_nonfinite(engine)
        stop_run(engine, "nan")
