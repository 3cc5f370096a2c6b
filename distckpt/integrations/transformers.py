"""distckpt in the Trainer of Hugging Face transformers: :class:`DistckptCallback`."""

import tempfile
from collections.abc import Mapping
from typing import Any

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME

from distckpt.integrations import trainer_hooks
from distckpt.integrations.callback_loop import LoopCallback


class DistckptCallback(LoopCallback, TrainerCallback, trainer_hooks.TrainerHooks):  # type: ignore[misc]  # checked without transformers
    """Callback that saves a Trainer's whole state in the background, resumes it, and stops it on all ranks together.

    A run that was killed and started again ends with the parameters of an uninterrupted run, bit for bit. An iteration
    of :attr:`loop` is an optimizer step: with gradient accumulation, several batches. A save follows the step's logs
    and evaluation; at the last step of an epoch, it follows those of the epoch.

    Set ``save_strategy="no"``, or the Trainer also saves by itself. A callback is for one call of ``train()``.

    Args:
        directory: where the checkpoints are.
        save_every: optimizer steps from one save to the next; None to save after each epoch.
        n_saved: number of checkpoints to keep; None keeps all.
        handlers: handlers of distckpt or ignite, called after each step; None for a :class:`~distckpt.TerminateOnNan`,
            which looks at the loss.
        to_save: further objects to save, by name.
        preemption: whether SIGTERM and SIGUSR1, on any rank, save and stop the run.
        background: whether saves are written while training continues.
        record_events: whether `directory` gets a record of the run's events, for ``distckpt plot``.

    Attributes:
        loop: the engine that stands for the Trainer. Attach more handlers to it. ``loop.state.output`` holds the losses
            of a step's batches, ``loop.state.metrics`` the results of the last evaluation.
        checkpoint: the handler that saves.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument has a wrong value.

    Example:
        >>> callback = DistckptCallback("checkpoints", save_every=100)  # doctest: +SKIP
        >>> trainer = Trainer(model, args, train_dataset=data, callbacks=[callback])  # doctest: +SKIP
        >>> trainer.train(resume_from_checkpoint=callback.resume(trainer))  # doctest: +SKIP
    """

    _folder: tempfile.TemporaryDirectory[str] | None = None

    def _make_progress(self) -> trainer_hooks.TrainerProgress:
        self._progress = trainer_hooks.TrainerProgress()
        self._losses: list[Any] = []
        return self._progress

    def resume(self, trainer: Trainer) -> str | None:
        """Collective. Find the newest whole checkpoint, and prepare `trainer`. To be called before each ``train()``.

        Returns:
            The argument `resume_from_checkpoint` of ``trainer.train()``: a folder, or None if there is no checkpoint.

        Raises:
            ValueError: the Trainer has a setting with which it cannot be resumed exactly.
            RuntimeError: the callback is not one of the Trainer's, or was used before.
            LoadError: there are checkpoints, but none is whole and complete.
        """
        problem = trainer_hooks.why_unsupported(trainer)
        if problem is not None:
            raise ValueError(f"DistckptCallback cannot resume a Trainer with {problem}")
        if not any(one is self for one in trainer.callback_handler.callbacks):
            raise RuntimeError("give the DistckptCallback to its Trainer first: Trainer(..., callbacks=[callback])")
        if self._progress.trainer is not None:
            raise RuntimeError("a DistckptCallback is for one call of train(): make another one")
        found = self._run.find()
        self._progress.trainer = trainer
        trainer_hooks.install(trainer, self)
        if found is None:
            return None
        self._folder = tempfile.TemporaryDirectory(prefix="distckpt-", ignore_cleanup_errors=True)
        self._progress.write(f"{self._folder.name}/{TRAINER_STATE_NAME}")
        return self._folder.name

    # -- the Trainer's events ------------------------------------------------------------------------

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Collective. Load what :meth:`resume` has found, and start the run."""
        trainer = self._progress.trainer
        if trainer is None:
            msg = "call trainer.train(resume_from_checkpoint=callback.resume(trainer)): it has to know the Trainer"
            raise RuntimeError(msg)
        if (self._folder is None) != (self._progress.loaded is None) or state.global_step != self._num_steps_loaded:
            raise RuntimeError("train() was not called with resume_from_checkpoint=callback.resume(trainer)")
        self._remove_folder()
        loader = kwargs["train_dataloader"]
        num_steps = trainer_hooks.num_steps_in_epoch(trainer, loader)
        self._run.load(trainer_hooks.objects_of(trainer))
        self._run.begin(loader, max_iters=state.max_steps, epoch_length=num_steps)
        del args

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start an iteration, after its batches are drawn."""
        self._losses.clear()
        self._run.begin_iteration()

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Keep the results for handlers with a score."""
        self.loop.state.metrics.update(metrics or {})

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """End the run, if no epoch was left to train."""
        self._run.end()

    # -- what the Trainer has no events for ----------------------------------------------------------

    def before_epoch(self) -> bool:
        """Start an epoch."""
        return self._run.begin_epoch()

    def after_batch(self, loss: Any) -> None:
        """Keep the loss."""
        self._losses.append(loss.detach())

    def after_step(self) -> None:
        """Collective. Complete an iteration, unless the epoch's own logs and evaluation follow."""
        if self._run.num_in_epoch > 0 and not self._run.complete_iteration(tuple(self._losses)):
            self._control.should_training_stop = True

    def after_epoch(self) -> None:
        """Collective. Complete the epoch, and its last iteration."""
        if self._run.num_in_epoch == 0:
            self._run.complete_iteration(tuple(self._losses))
        if not self._run.end_epoch(stops=self._control.should_training_stop):
            self._control.should_training_stop = True

    def on_error(self, error: BaseException) -> None:
        """Tell the other ranks."""
        self._remove_folder()
        self._run.fail(error)

    @property
    def _control(self) -> TrainerControl:
        assert self._progress.trainer is not None  # noqa: S101 - narrows the type; set before train()
        return self._progress.trainer.control

    @property
    def _num_steps_loaded(self) -> int:
        return 0 if self._progress.loaded is None else int(self._progress.loaded["global_step"])

    def _remove_folder(self) -> None:
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None
