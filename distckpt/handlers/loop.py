"""A training loop that the program writes itself, with all handlers of an ignite engine."""

from collections.abc import Iterator
from types import TracebackType
from typing import Any, Self

from distckpt.handlers.progress import progress_of
from distckpt.handlers.stepped_engine import Pause, SteppedEngine


class Loop(SteppedEngine):
    """An ignite engine without a step function: the program draws its batches and trains them, in ``for`` statements.

    Handlers, :func:`~distckpt.resume`, :class:`~distckpt.RngState` and ``to_save`` take a Loop where they take an
    engine. It fires the events of ``Engine.run()`` in the same order: STARTED where ``with`` is entered,
    EPOCH_STARTED and EPOCH_COMPLETED around the body of ``for epoch``, GET_BATCH_STARTED, GET_BATCH_COMPLETED,
    ITERATION_STARTED and ITERATION_COMPLETED around the body of ``for batch``, and COMPLETED after the last epoch. What
    follows ``for batch`` in an epoch, such as an evaluation or a scheduler's step, runs before EPOCH_COMPLETED.

    If a handler stops the run, TERMINATE and COMPLETED fire, and both ``for`` statements end. What follows the
    batches still runs, after these events. ``break`` in ``for batch`` completes the iteration and ends the epoch, like
    :meth:`terminate_epoch` in a step function. Leaving ``with`` before the end completes the iteration and stops the
    run, like :meth:`terminate`. An exception that leaves ``with`` is handled as one that a step function raises:
    EXCEPTION_RAISED fires, and the other ranks raise a RemoteRankError.

    Args:
        data: the batches: a DataLoader or another iterable; None for no data, and then give `epoch_length`.
        max_epochs: number of epochs; 1 if neither it nor `max_iters` is given.
        max_iters: number of iterations, instead of `max_epochs`.
        epoch_length: iterations in an epoch; None for the length of `data`.

    Example:
        >>> import torch
        >>> from ignite.engine import Events
        >>> from distckpt import TerminateOnNan
        >>> model = torch.nn.Linear(1, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> loop = Loop([torch.ones(2, 1), torch.zeros(2, 1)], max_epochs=3)
        >>> loop.add_event_handler(Events.ITERATION_COMPLETED, TerminateOnNan()) and None
        >>> with loop:
        ...     for epoch in loop.epochs():
        ...         for batch in loop.batches():
        ...             loss = model(batch).square().mean()
        ...             optimizer.zero_grad()
        ...             loss.backward()
        ...             optimizer.step()
        ...             loop.output = loss.item()
        >>> loop.state.epoch, loop.state.iteration
        (3, 6)
    """

    def __init__(
        self,
        data: Any = None,
        *,
        max_epochs: int | None = None,
        max_iters: int | None = None,
        epoch_length: int | None = None,
    ) -> None:
        super().__init__()
        self._arguments = (data, max_epochs, max_iters, epoch_length)

    @property
    def output(self) -> Any:
        """The output of the present iteration's step: ``state.output``, which handlers read."""
        return self.state.output

    @output.setter
    def output(self, value: Any) -> None:
        self.state.output = value

    def __enter__(self) -> Self:
        """Start a run, or continue the one that :func:`~distckpt.resume` has restored.

        Collective if the run was resumed, or if a handler of STARTED is.

        Raises:
            RuntimeError: a run of this loop is under way.
            ValueError: ignite refuses the arguments, or the position in the data cannot be determined.
        """
        if self.pause is not None:
            raise RuntimeError("a run of this Loop is under way")
        self.begin(*self._arguments)
        return self

    def epochs(self) -> Iterator[int]:
        """Yield the number of each epoch to train, from 1, or from the one in which a resumed run was saved.

        Raises:
            RuntimeError: called outside ``with``, or an epoch's batches were not drawn.
        """
        if self.pause is None:
            raise RuntimeError("use Loop.epochs() and Loop.batches() inside `with loop:`")
        while self.pause is not Pause.RUN_ENDED:
            if self.pause is Pause.EPOCH_STARTED:
                raise RuntimeError("the epoch's batches were not drawn: iterate over Loop.batches() in each epoch")
            if self.pause is Pause.ITERATION_STARTED:  # `break`
                self.terminate_epoch()
                progress_of(self).is_rest_done = True
            if self.advance() in (Pause.EPOCH_STARTED, Pause.EPOCH_TRAINED):
                yield self.state.epoch

    def batches(self) -> Iterator[Any]:
        """Yield the epoch's batches: in a resumed epoch, those that were not trained.

        Another call in the same epoch goes on with the next batch.

        Raises:
            RuntimeError: called outside ``for epoch in loop.epochs()``.
        """
        if self.pause in (None, Pause.RUN_STARTED, Pause.RUN_ENDED):
            raise RuntimeError("use Loop.batches() inside `for epoch in loop.epochs():`")
        advance, state = self.advance, self.state
        if self.pause in (Pause.EPOCH_STARTED, Pause.ITERATION_STARTED):
            while advance() is Pause.ITERATION_STARTED:
                yield state.batch

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        """End the run; return True if a handler of EXCEPTION_RAISED has caught the exception."""
        if self.pause is None or self.pause is Pause.RUN_ENDED:
            self.pause = None
            return False
        try:
            has_ended = error is not None and self.throw(error) is Pause.RUN_ENDED
            if not has_ended:
                self.terminate()
            while not has_ended:
                has_ended = self.advance() is Pause.RUN_ENDED
        finally:
            self.pause = None
        return error is not None
