"""An engine that the callbacks of another package's training loop drive, with its checkpoints and votes."""

import logging
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from ignite.engine import Events

from distckpt.handlers import rng_generators
from distckpt.handlers.checkpoint import Checkpoint
from distckpt.handlers.data_loaders import is_data_generator
from distckpt.handlers.disk_saver import DiskSaver
from distckpt.handlers.preemption import Preemption
from distckpt.handlers.resume import Resumed, resume
from distckpt.handlers.rng_state import RngState
from distckpt.handlers.stepped_engine import Pause, SteppedEngine
from distckpt.handlers.terminate_on_nan import TerminateOnNan

_logger = logging.getLogger(__name__)


class LoaderRngState(RngState):
    """The generators of a loop that draws its batches itself, and those of its loader.

    Attributes:
        loader: what the loop draws from; None if unknown.
    """

    def __init__(self) -> None:
        super().__init__()
        self.loader: Any = None
        self._is_in_pass = self._is_set = False

    def begin_epoch(self, iteration: int, *, is_resumed: bool) -> None:
        """Capture the generators before the loop makes its iterator. Rank-local.

        Args:
            iteration: number of iterations trained.
            is_resumed: whether the pass is the loaded one. Then the generators are set to their states from its start,
                so that the sampler draws the same order and workers get the same seeds.
        """
        self._is_in_pass = is_resumed and self._pass is not None
        if self._is_in_pass:
            self.restore_pass_start()
        else:
            self._capture_pass_start(iteration)

    def finish_pass_restore(self) -> None:
        """Set the generators to the loaded state now, and not again before the first iteration. Rank-local.

        For a loop that draws no batch ahead. Call it when the trained batches are skipped, before the next draw.
        """
        self.restore_loaded()
        self._is_set = True

    def restore_loaded(self) -> None:
        """Set the generators to the loaded state. In the loaded pass, leave the loader's: they have drawn its order."""
        if self._is_set:
            return
        if self._loaded is not None and self._is_in_pass:
            now = self._loaded["now"]
            program = {name: one for name, one in now.get("generators", {}).items() if not is_data_generator(name)}
            rng_generators.restore({**now, "generators": program}, self._program_generators)
        else:
            super().restore_loaded()

    @property
    def _data(self) -> Any:
        return self.loader

    def _capture(self) -> dict[str, Any]:
        return {"now": rng_generators.capture(self._generators), "pass": self._pass}


class CallbackLoop:
    """An engine, driven by callbacks, that saves the loop's state, votes and stops.

    The callbacks call, on all ranks: :meth:`find`, :meth:`load`, :meth:`begin`; for each epoch :meth:`begin_epoch`, for
    each iteration :meth:`begin_iteration` and :meth:`complete_iteration`, then :meth:`end_epoch`; :meth:`end`. Each is
    collective if a handler is. An exception goes to :meth:`fail`.

    Args:
        directory: where the checkpoints are.
        save_every: iterations from one save to the next; None to save after each epoch.
        n_saved: number of checkpoints to keep; None keeps all.
        handlers: called after each iteration; None for a :class:`~distckpt.TerminateOnNan`.
        to_save: further objects to save.
        preemption: whether SIGTERM and SIGUSR1 save and stop the run.
        background: whether saves are written while training continues.
        record_events: whether the run's events are recorded in `directory`.
        progress: the state of the package's own loop, to be saved.

    Attributes:
        engine: the engine. Its iterations are optimizer steps.
        checkpoint: the handler that saves.
        rng: the generators.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        save_every: int | None,
        *,
        n_saved: int | None,
        handlers: Iterable[Callable[..., Any]] | None,
        to_save: Mapping[str, Any] | None,
        preemption: bool,
        background: bool,
        record_events: bool,
        progress: Any,
    ) -> None:
        if save_every is not None and (not isinstance(save_every, int) or save_every < 1):
            msg = f"Argument save_every should be a positive number of optimizer steps or None, but given {save_every}"
            raise ValueError(msg)
        self.engine = SteppedEngine(pauses_after_iterations=True)
        self.engine.state_dict_user_keys.append("metrics")  # an epoch may be completed after a resume
        self.rng = LoaderRngState()
        self._objects: dict[str, Any] = {"loop": self.engine, "progress": progress, "rng": self.rng}
        self._own = dict(to_save or {})
        self._found: Resumed | None = None
        self._epoch_length = 1
        saver = DiskSaver(Path(directory), require_empty=False, background=background, record_events=record_events)
        self.checkpoint = Checkpoint(self._objects | self._own, saver, n_saved=n_saved)
        event = Events.EPOCH_COMPLETED if save_every is None else Events.ITERATION_COMPLETED(every=save_every)
        self.engine.add_event_handler(event, self.checkpoint)
        for handler in [TerminateOnNan()] if handlers is None else handlers:
            self.engine.add_event_handler(Events.ITERATION_COMPLETED, handler)
        self._preemption = Preemption(self.engine, self.checkpoint) if preemption else None

    def find(self) -> Resumed | None:
        """Collective. Load the progress of the newest whole checkpoint; :meth:`load` loads the other objects."""
        self._found = resume({"progress": self._objects["progress"]}, self.checkpoint)
        return self._found

    @property
    def has_ended(self) -> bool:
        """Return True if nothing is left to train."""
        return self.engine.pause in (None, Pause.RUN_ENDED)

    @property
    def num_in_epoch(self) -> int:
        """The number of iterations trained in the epoch under way, the present one included; 0 at the epoch's end."""
        return self.engine.state.iteration % self._epoch_length

    def load(self, objects: Mapping[str, Any]) -> None:
        """Collective. Load the checkpoint that :meth:`find` has found, if any.

        Args:
            objects: model, optimizers and the other objects of the package's loop, by name.

        Raises:
            ValueError: further objects to save have names that are in use.
        """
        both = sorted(objects.keys() & self._own.keys() | self._objects.keys() & self._own.keys())
        if both:
            raise ValueError(f"Argument to_save has the names {', '.join(both)}, which are saved anyway")
        self.checkpoint.to_save = {**self._objects, **objects, **self._own}
        if self._found is not None:
            # find() has verified the file already.
            resume(self.checkpoint.to_save, self.checkpoint, engine=self.engine, verify=False)

    def begin(self, loader: Any, *, max_iters: int, epoch_length: int) -> None:
        """Collective. Start the run, or continue the one that was loaded.

        Args:
            loader: what the package's loop draws from.
            max_iters: number of iterations in the run.
            epoch_length: number of iterations in an epoch.
        """
        self.rng.loader, self._epoch_length = loader, epoch_length
        self.engine.begin(None, None, max_iters, epoch_length)

    def begin_epoch(self) -> bool:
        """Start an epoch, before the loop makes its iterator; return False if the run has ended."""
        engine = self.engine
        is_resumed = engine.pause is Pause.RUN_STARTED and self.rng.is_loaded
        self._leave_start()
        if engine.pause is not Pause.EPOCH_STARTED:
            self.end()
            return False
        self.rng.begin_epoch(engine.state.iteration, is_resumed=is_resumed and self.num_in_epoch > 0)
        return True

    def begin_iteration(self) -> None:
        """Start an iteration, after its batch is drawn."""
        if self.engine.pause in (Pause.EPOCH_STARTED, Pause.ITERATION_COMPLETED):
            self.engine.advance()

    def complete_iteration(self, output: Any) -> bool:
        """Complete an iteration, when all that belongs to it is done; return False if the run stops.

        Args:
            output: the loss, which handlers read as ``state.output``.
        """
        if self.engine.pause is not Pause.ITERATION_STARTED:
            return False
        self.engine.state.output = output
        return self.engine.advance() is Pause.ITERATION_COMPLETED

    def end_epoch(self, *, stops: bool) -> bool:
        """Complete an epoch; return False if the run has ended.

        Args:
            stops: whether the package's loop ends here.

        Raises:
            RuntimeError: the epoch is not complete, and the loop goes on: no resume could find the position.
        """
        engine, state = self.engine, self.engine.state
        if engine.pause is Pause.ITERATION_COMPLETED and self.num_in_epoch == 0:
            engine.advance()
        elif engine.pause is Pause.ITERATION_COMPLETED and not stops:
            raise RuntimeError(
                f"an epoch ended after {self.num_in_epoch} of {self._epoch_length} steps, and the run goes on: a "
                f"resumed run could not find its position in the data"
            )
        if stops and not self.has_ended and state.iteration != state.max_iters:
            engine.terminate()
        while engine.pause not in (None, Pause.EPOCH_STARTED, Pause.RUN_ENDED):
            engine.advance()
        return engine.pause is Pause.EPOCH_STARTED

    def end(self) -> None:
        """Complete the run, and wait until background saves are durable."""
        engine = self.engine
        self._leave_start()
        if not self.has_ended:
            engine.terminate()
            while engine.pause not in (None, Pause.RUN_ENDED):
                engine.advance()
        self.close()

    def _leave_start(self) -> None:
        """Go on from the run's start, and complete an epoch that was saved after its last iteration."""
        while self.engine.pause in (Pause.RUN_STARTED, Pause.EPOCH_TRAINED):
            self.engine.advance()

    def fail(self, error: BaseException) -> None:
        """Handle the loop's exception as if an engine's step had raised it: tell the other ranks. May raise another."""
        try:
            if not self.has_ended:
                self.engine.throw(error)
        finally:
            self.close()

    def close(self) -> None:
        """Restore the signals' previous handlers. Rank-local."""
        if self._preemption is not None:
            self._preemption.close()


class LoopCallback(ABC):
    """Base class of the callbacks of all packages: their arguments, and the engine and the handler that they expose.

    The arguments are those of :class:`CallbackLoop`.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        save_every: int | None = 500,
        *,
        n_saved: int | None = 2,
        handlers: Iterable[Callable[..., Any]] | None = None,
        to_save: Mapping[str, Any] | None = None,
        preemption: bool = True,
        background: bool = True,
        record_events: bool = True,
    ) -> None:
        self._run = CallbackLoop(
            directory,
            save_every,
            n_saved=n_saved,
            handlers=handlers,
            to_save=to_save,
            preemption=preemption,
            background=background,
            record_events=record_events,
            progress=self._make_progress(),
        )

    @abstractmethod
    def _make_progress(self) -> Any:
        """Set the callback's own attributes, and return the state of the package's loop, to be saved."""

    @property
    def loop(self) -> SteppedEngine:
        """The engine that stands for the Trainer."""
        return self._run.engine

    @property
    def checkpoint(self) -> Checkpoint:
        """The handler that saves."""
        return self._run.checkpoint
