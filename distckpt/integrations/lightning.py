"""distckpt in Lightning's Trainer: :class:`DistckptCallback`."""

from collections.abc import Callable
from typing import Any

from pytorch_lightning import Callback, LightningModule, Trainer

from distckpt.handlers.stepped_engine import Pause
from distckpt.integrations import lightning_hooks
from distckpt.integrations.callback_loop import LoopCallback


class DistckptCallback(LoopCallback, Callback, lightning_hooks.FitHooks):  # type: ignore[misc]  # checked without Lightning
    """Callback that saves a Trainer's whole state in the background, resumes it, and stops it on all ranks together.

    A run that was killed and started again ends with the parameters of an uninterrupted run, bit for bit. ``fit()``
    loads the newest whole checkpoint by itself, and skips the trained batches of the epoch. An iteration of
    :attr:`loop` is an optimizer step: with gradient accumulation, several batches; with manual optimization, one batch.
    A save follows the step's validation; at the last step of an epoch, it follows all that belongs to the epoch.

    Set ``Trainer(enable_checkpointing=False)``, or Lightning also saves by itself. A callback is for one ``fit()``.

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
        loop: the engine that stands for the Trainer. Attach more handlers to it. ``loop.state.output`` holds what
            ``training_step`` returned for a step's batches, ``loop.state.metrics`` the Trainer's ``callback_metrics``.
        checkpoint: the handler that saves.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument has a wrong value.

    Example:
        >>> callback = DistckptCallback("checkpoints", save_every=100)  # doctest: +SKIP
        >>> Trainer(callbacks=[callback], enable_checkpointing=False).fit(module, loader)  # doctest: +SKIP
    """

    _uninstall: Callable[[], None] | None = None
    _is_first_epoch = True

    def _make_progress(self) -> lightning_hooks.FitProgress:
        self._progress = lightning_hooks.FitProgress()
        self._outputs: list[Any] = []
        return self._progress

    # -- the Trainer's events ------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Collective. Find the newest whole checkpoint."""
        if stage != "fit":
            return
        problem = lightning_hooks.why_unsupported(trainer)
        if problem is not None:
            raise ValueError(f"DistckptCallback cannot resume a Trainer with {problem}")
        if self._progress.trainer is not None:
            raise RuntimeError("a DistckptCallback is for one call of fit(): make another one")
        self._run.find()
        self._progress.trainer = trainer
        self._uninstall = lightning_hooks.install(trainer, self)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Collective. Load what was found."""
        self._run.load(lightning_hooks.objects_of(trainer))
        state = self.loop.state
        length = state.epoch_length
        self._progress.apply(is_in_epoch=bool(length) and state.iteration % (length or 1) > 0)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Collective. Start the run."""
        self._begin()
        if self._run.has_ended:
            lightning_hooks.stop(trainer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Start an iteration, after its first batch is drawn."""
        self._run.begin_iteration()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Keep the loss."""
        self._outputs.append(outputs)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Collective. End the run."""
        self._run.end()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Tell the other ranks. It may raise another exception."""
        self.teardown(trainer, pl_module, "fit")  # which Lightning does not call then
        self._run.fail(exception)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Restore the Trainer's own methods and the signals' previous handlers."""
        if self._uninstall is not None:
            self._uninstall()
            self._uninstall = None
        self._run.close()

    # -- what the Trainer has no events for ----------------------------------------------------------

    def before_epoch(self, fetcher: Any) -> None:
        """Collective. Start an epoch; in the process's first one, make the iterator anew with the generators set."""
        trainer, is_resumed = self._trainer, self._run.rng.is_loaded
        self._outputs.clear()
        if not self._run.begin_epoch():
            lightning_hooks.stop(trainer)
        if not self._is_first_epoch:
            return
        self._is_first_epoch = False
        iter(fetcher)
        if is_resumed and self._run.num_in_epoch > 0:
            lightning_hooks.skip_batches(trainer, fetcher)
            self._run.rng.finish_pass_restore()

    def is_in_step(self) -> bool:
        """Return True if a step has been started and not completed."""
        return self.loop.pause is Pause.ITERATION_STARTED

    def after_step(self) -> None:
        """Collective. Complete an iteration, unless it is the epoch's last: :meth:`after_epoch` completes that."""
        if self._run.num_in_epoch > 0 and not self._complete():
            lightning_hooks.stop(self._trainer)

    def after_epoch(self) -> None:
        """Collective. Complete the epoch, and its last iteration."""
        if self._run.num_in_epoch == 0 and self.is_in_step():
            self._complete()
        if not self._run.end_epoch(stops=self._trainer.should_stop):
            lightning_hooks.stop(self._trainer)

    def _begin(self) -> None:
        max_iters, epoch_length = lightning_hooks.limits_of(self._trainer)
        self._run.begin(lightning_hooks.loader_of(self._trainer), max_iters=max_iters, epoch_length=epoch_length)

    def after_run(self) -> None:
        """Collective. End a resumed run that had no epoch left to train."""
        rng = self._run.rng
        if not self._is_first_epoch or not rng.is_loaded:
            return
        rng.loader = lightning_hooks.loader_of(self._trainer)
        rng.restore_loaded()  # the Trainer has made an iterator, which draws a seed
        if self.loop.pause is None and rng.loader is not None:  # the Trainer has skipped its events, too
            self._begin()
            self._run.end()

    def _complete(self) -> bool:
        self.loop.state.metrics.update(self._trainer.callback_metrics)
        outputs, self._outputs = self._outputs, []
        return self._run.complete_iteration(outputs)

    @property
    def _trainer(self) -> Trainer:
        assert self._progress.trainer is not None  # noqa: S101 - narrows the type; set before fit()
        return self._progress.trainer
