"""What distckpt relies on in Lightning beyond its callbacks. A failure here names what a new release has moved."""

import inspect
import re
from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("pytorch_lightning", reason="not in this environment")

from pytorch_lightning import Trainer
from pytorch_lightning.loops import _FitLoop
from pytorch_lightning.loops.fetchers import _PrefetchDataFetcher
from pytorch_lightning.loops.training_epoch_loop import _TrainingEpochLoop
from pytorch_lightning.trainer.connectors.signal_connector import _SignalConnector

STATEMENTS: list[tuple[Callable[..., Any], tuple[str, ...]]] = [
    (
        Trainer._run,
        (
            "self.strategy.setup_environment()",
            "call._call_setup_hook(self)",
            "self.strategy.setup(self)",
            'call._call_callback_hooks(self, "on_fit_start")',
            "self._checkpoint_connector.restore_training_state()",
            "self._signal_connector.register_signal_handlers()",
            "self._run_stage()",
        ),
    ),
    (Trainer._run_stage, ("self.fit_loop.run()",)),
    (
        _FitLoop.run,
        (
            "self.setup_data()",
            "if self.skip: return",
            "self.reset()",
            "self.on_run_start()",
            "self.advance()",
            "self.on_advance_end()",
        ),
    ),
    (_FitLoop.setup_data, ("iter(self._data_fetcher)",)),
    (_FitLoop.on_advance_end, ("update_plateau_schedulers=not self.restarting", "increment_completed()")),
    (_FitLoop.on_run_start, ('call._call_callback_hooks(trainer, "on_train_start")',)),
    (
        _TrainingEpochLoop.run,
        (
            "self.reset()",
            "self.on_run_start(data_fetcher)",
            "while not self.done:",
            "self.advance(data_fetcher)",
            "self.on_advance_end(data_fetcher)",
        ),
    ),
    (
        _TrainingEpochLoop.on_run_start,
        (
            "not self.trainer.fit_loop.is_resuming and not self.restarting: iter(data_fetcher)",
            "data_fetcher.fetched += self.batch_progress.current.ready",
        ),
    ),
    (
        _TrainingEpochLoop.advance,
        (
            "if self.restarted_on_last:",
            "self._skip_next_val = True return",
            "next(data_fetcher)",
            'call._call_callback_hooks(trainer, "on_train_batch_start", batch, batch_idx)',
            'call._call_callback_hooks(trainer, "on_train_batch_end", batch_output, batch, batch_idx)',
        ),
    ),
    (
        _TrainingEpochLoop.on_advance_end,
        ("self.val_loop.run()", 'self.update_lr_schedulers("step", update_plateau_schedulers=True)'),
    ),
    (
        _SignalConnector.register_signal_handlers,
        ("[self._sigterm_notifier_fn]", "sigterm_handlers.append(signal.getsignal(signal.SIGTERM))"),
    ),
    (_PrefetchDataFetcher.__iter__, ("if self.length is not None: return self",)),
]


@pytest.mark.parametrize(("function", "statements"), STATEMENTS, ids=[one.__qualname__ for one, _ in STATEMENTS])
def test_lightnings_source_has_the_statements_that_are_relied_on_in_their_order(
    function: Callable[..., Any], statements: tuple[str, ...]
) -> None:
    source = re.sub(r"\s+", " ", re.sub(r"#.*", "", inspect.getsource(function)))
    at = 0
    for statement in statements:
        found = source.find(statement, at)
        assert found >= 0, f"{function.__qualname__} has no longer, at its place: {statement}"
        at = found + len(statement)
