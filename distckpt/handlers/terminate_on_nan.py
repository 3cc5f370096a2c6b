"""Stop a run whose output is NaN or infinite: :class:`TerminateOnNan`."""

import logging
from collections.abc import Callable, Mapping
from typing import Any

from ignite.engine import Engine

from distckpt._messages import log_level
from distckpt.backends.detect import current
from distckpt.coordination.votes import Answer, DeferredAnswer, VoteKind
from distckpt.handlers.engine_votes import Voter, mark_nonfinite, stop_reason, stop_run
from distckpt.handlers.finite import PendingFlag, all_finite, describe_nonfinite, nonfinite_flag


class TerminateOnNan(Voter):
    """Handler that stops the run, on every rank at the same iteration, when any rank's output is NaN or infinite.

    Attach it on all ranks. All handlers that vote share one reduction per event. The step is not saved: a
    :class:`~distckpt.Checkpoint` on the same event holds the vote before it saves, whichever was attached first.

    Args:
        output_transform: takes the process function's output and returns the value to check: a number, a tensor, a
            NumPy array, None, or a nested collection of these. It should read the output alone: a save on the event
            may call it before handlers that were attached earlier.
        lag: 0 to stop in the iteration with the NaN; 1 to stop one iteration later, the same one on every rank. The
            reduction then runs beside that iteration, and nothing waits for an accelerator.
        every: hold the vote every N iterations only; the outputs between are checked too.
        timeout_s: seconds to wait for the other ranks; None for ``DISTCKPT_TIMEOUT_S``, or 300.

    Raises:
        TypeError: `output_transform` is not callable.
        ValueError: `lag` or `every` has a wrong value.

    Example:
        >>> from ignite.engine import Events
        >>> trainer = Engine(lambda engine, batch: float("nan") if batch == 2 else 0.0)
        >>> trainer.add_event_handler(Events.ITERATION_COMPLETED, TerminateOnNan()) and None
        >>> trainer.run([0, 1, 2, 3]).iteration
        3
    """

    vote_kind = VoteKind.NAN
    detects_nan = True

    def __init__(
        self,
        output_transform: Callable[[Any], Any] = lambda output: output,
        *,
        lag: int | None = None,
        every: int | None = None,
        timeout_s: float | None = None,
    ) -> None:
        if not callable(output_transform):
            raise TypeError(f"Argument output_transform should be a function, but given {type(output_transform)}")
        self._init_voter(__name__, lag=lag, every=every, timeout_s=timeout_s)
        self._output_transform = output_transform
        self._nonfinite_output: Any = None

    def __call__(self, engine: Engine) -> None:
        """Collective, after the event: one reduction with all handlers that vote.

        Raises:
            RemoteRankError: a rank cannot check its output; raised on every rank. With one rank: a TypeError.
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
        if self.lag or current().can_reduce_lazily:
            flag: Any = nonfinite_flag(output)
        else:
            flag = not all_finite(output)
        if flag is False:
            return None
        step = engine.state.iteration

        def describe() -> str:
            self._nonfinite_output = output
            return self._describe(step, output)

        return describe if flag is True else DeferredAnswer(PendingFlag(flag), describe)

    def _act(self, engine: Engine, reports: Mapping[int, Any]) -> None:
        output, self._nonfinite_output = self._nonfinite_output, None
        self._stop(engine, output, reports, current().rank)

    @staticmethod
    def _describe(step: int, output: Any) -> str:
        return f"iteration {step}: {describe_nonfinite(output) or 'overwritten since'}"

    def _stop(self, engine: Engine, output: Any, reports: Mapping[int, Any], rank: int) -> None:
        name = type(self).__name__
        where = "; ".join(f"rank {one}, {detail}" for one, detail in reports.items())
        # With a lag the next iteration may have a NaN too, when the run is stopped already.
        level = logging.DEBUG if stop_reason(engine) == "nan" else log_level(rank, {0, *reports})
        if rank in reports:
            self.logger.log(level, "%s: Output '%s' contains NaN or Inf. Stop training (%s)", name, output, where)
        else:
            self.logger.log(level, "%s: Output of another rank contains NaN or Inf. Stop training (%s)", name, where)
        mark_nonfinite(engine)
        stop_run(engine, "nan")
