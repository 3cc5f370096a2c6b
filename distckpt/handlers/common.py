"""``ignite.contrib.engines.common`` with distckpt's handlers: the same functions with the same arguments.

ignite's functions make ignite's own Checkpoint, EarlyStopping and TerminateOnNan, whatever a program imports. The
functions that make one of these are reimplemented here. The rest of ignite's module is exported unchanged.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, cast

import ignite.contrib.engines.common as _ignites
import torch
from ignite.contrib.engines.common import empty_cuda_cache, setup_any_logging
from ignite.engine import Engine, Events
from ignite.handlers import ProgressBar
from ignite.handlers.logger_utils import (
    setup_clearml_logging,
    setup_mlflow_logging,
    setup_neptune_logging,
    setup_plx_logging,
    setup_tb_logging,
    setup_trains_logging,
    setup_visdom_logging,
    setup_wandb_logging,
)
from ignite.handlers.param_scheduler import ParamScheduler
from torch import nn
from torch.utils.data.distributed import DistributedSampler

from distckpt.handlers.checkpoint import Checkpoint
from distckpt.handlers.disk_saver import DiskSaver
from distckpt.handlers.early_stopping import EarlyStopping
from distckpt.handlers.global_step import global_step_from_engine
from distckpt.handlers.save_handler import BaseSaveHandler
from distckpt.handlers.terminate_on_nan import TerminateOnNan

__all__ = [
    "BaseSaveHandler",
    "Checkpoint",
    "DiskSaver",
    "EarlyStopping",
    "ProgressBar",
    "TerminateOnNan",
    "add_early_stopping_by_val_score",
    "empty_cuda_cache",
    "gen_save_best_models_by_val_score",
    "get_default_score_fn",
    "global_step_from_engine",
    "save_best_model_by_val_score",
    "setup_any_logging",
    "setup_clearml_logging",
    "setup_common_distrib_training_handlers",
    "setup_common_training_handlers",
    "setup_mlflow_logging",
    "setup_neptune_logging",
    "setup_plx_logging",
    "setup_tb_logging",
    "setup_trains_logging",
    "setup_visdom_logging",
    "setup_wandb_logging",
]

get_default_score_fn = Checkpoint.get_default_score_fn


def setup_common_training_handlers(
    trainer: Engine,
    train_sampler: DistributedSampler[Any] | None = None,
    to_save: Mapping[str, Any] | None = None,
    save_every_iters: int = 1000,
    output_path: str | None = None,
    lr_scheduler: ParamScheduler | torch.optim.lr_scheduler.LRScheduler | None = None,
    with_gpu_stats: bool = False,
    output_names: Iterable[str] | None = None,
    with_pbars: bool = True,
    with_pbar_on_iters: bool = True,
    log_every_iters: int = 100,
    stop_on_nan: bool = True,
    clear_cuda_cache: bool = True,
    save_handler: Callable[..., Any] | BaseSaveHandler | None = None,
    **kwargs: Any,
) -> None:
    """Attach the handlers that most training runs have, in ignite's order. Call it on all ranks.

    The arguments are those of ignite's function. A :class:`Checkpoint` is attached if `to_save` is given, and a
    :class:`TerminateOnNan` if `stop_on_nan` is true; ignite's function attaches the other handlers.

    Raises:
        ValueError: `output_path` and `save_handler` are both given, or neither of them with `to_save`.
        TypeError: `train_sampler` is not a DistributedSampler, in a job of several ranks.

    Example:
        >>> import os, tempfile
        >>> trainer = Engine(lambda engine, batch: {"loss": 0.5})
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     setup_common_training_handlers(
        ...         trainer, to_save={"trainer": trainer}, save_every_iters=2, output_path=folder, with_pbars=False
        ...     )
        ...     trainer.run([0, 1], max_epochs=3) and None
        ...     os.listdir(folder)
        ['training_trainer_6.pt']
    """
    if output_path is not None and save_handler is not None:
        msg = "Arguments output_path and save_handler are mutually exclusive. Please, define only one of them"
        raise ValueError(msg)
    if to_save is not None and output_path is None and save_handler is None:
        msg = "If to_save argument is provided then output_path or save_handler arguments should be also defined"
        raise ValueError(msg)
    if stop_on_nan:
        trainer.add_event_handler(Events.ITERATION_COMPLETED, TerminateOnNan())
    # ignite attaches the Checkpoint between these two groups, so that it saves the scheduler's state after the step.
    _ignites.setup_common_training_handlers(
        trainer, lr_scheduler=lr_scheduler, clear_cuda_cache=clear_cuda_cache, with_pbars=False, stop_on_nan=False
    )
    if to_save is not None:
        saver = save_handler if output_path is None else DiskSaver(output_path, require_empty=False)
        checkpoint = Checkpoint(to_save, cast("Any", saver), filename_prefix="training", **kwargs)
        trainer.add_event_handler(Events.ITERATION_COMPLETED(every=save_every_iters), checkpoint)
    _ignites.setup_common_training_handlers(
        trainer,
        train_sampler=train_sampler,
        with_gpu_stats=with_gpu_stats,
        output_names=output_names,
        with_pbars=with_pbars,
        with_pbar_on_iters=with_pbar_on_iters,
        log_every_iters=log_every_iters,
        stop_on_nan=False,
        clear_cuda_cache=False,
    )


setup_common_distrib_training_handlers = setup_common_training_handlers


def gen_save_best_models_by_val_score(
    save_handler: Callable[..., Any] | BaseSaveHandler,
    evaluator: Engine,
    models: nn.Module | dict[str, nn.Module],
    metric_name: str,
    n_saved: int = 3,
    trainer: Engine | None = None,
    tag: str = "val",
    score_sign: float = 1.0,
    **kwargs: Any,
) -> Checkpoint:
    """Attach a :class:`Checkpoint` that keeps the best models by a metric of the evaluator. Call it on all ranks.

    Args:
        save_handler: the Checkpoint's save handler.
        evaluator: the engine whose metric is the score at the end of its run.
        models: a model, or models by name.
        metric_name: the key in ``evaluator.state.metrics``.
        n_saved: the number of checkpoints to keep. Without effect if `keep` is among `kwargs`.
        trainer: the engine whose epoch is in the file name; None for no epoch.
        tag: the beginning of the score's name.
        score_sign: 1.0, or -1.0 for a metric for which smaller values are better.
        kwargs: keyword arguments of :class:`Checkpoint`.

    Example:
        >>> import tempfile
        >>> evaluator = Engine(lambda engine, batch: None)
        >>> evaluator.add_event_handler(Events.EPOCH_COMPLETED, lambda e: e.state.metrics.update(acc=0.5)) and None
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     best = gen_save_best_models_by_val_score(DiskSaver(folder), evaluator, nn.Linear(1, 1), "acc")
        ...     evaluator.run([0]) and None
        ...     best.last_checkpoint.name
        'best_model_val_acc=0.5000.pt'
    """
    checkpoint = Checkpoint(
        {"model": models} if isinstance(models, nn.Module) else models,
        save_handler,
        filename_prefix="best",
        n_saved=1 if kwargs.get("keep") is not None else n_saved,
        global_step_transform=None if trainer is None else global_step_from_engine(trainer),
        score_name=f"{tag}_{metric_name.lower()}",
        score_function=get_default_score_fn(metric_name, score_sign=score_sign),
        **kwargs,
    )
    evaluator.add_event_handler(Events.COMPLETED, checkpoint)
    return checkpoint


def save_best_model_by_val_score(
    output_path: str,
    evaluator: Engine,
    model: nn.Module,
    metric_name: str,
    n_saved: int = 3,
    trainer: Engine | None = None,
    tag: str = "val",
    score_sign: float = 1.0,
    **kwargs: Any,
) -> Checkpoint:
    """Attach a :class:`Checkpoint` that keeps the best models in a directory. Call it on all ranks.

    The directory may hold files. The other arguments are those of :func:`gen_save_best_models_by_val_score`.
    """
    return gen_save_best_models_by_val_score(
        DiskSaver(output_path, require_empty=False),
        evaluator,
        model,
        metric_name,
        n_saved=n_saved,
        trainer=trainer,
        tag=tag,
        score_sign=score_sign,
        **kwargs,
    )


def add_early_stopping_by_val_score(
    patience: int, evaluator: Engine, trainer: Engine, metric_name: str, score_sign: float = 1.0
) -> EarlyStopping:
    """Attach an :class:`EarlyStopping` by a metric of the evaluator. Call it on all ranks.

    Args:
        patience: the number of runs of the evaluator to wait for an improvement.
        evaluator: the engine whose metric is the score at the end of its run.
        trainer: the engine to stop.
        metric_name: the key in ``evaluator.state.metrics``.
        score_sign: 1.0, or -1.0 for a metric for which smaller values are better.

    Example:
        >>> trainer, evaluator = Engine(lambda engine, batch: None), Engine(lambda engine, batch: None)
        >>> add_early_stopping_by_val_score(3, evaluator, trainer, "acc").patience
        3
    """
    handler = EarlyStopping(
        patience=patience, score_function=get_default_score_fn(metric_name, score_sign=score_sign), trainer=trainer
    )
    evaluator.add_event_handler(Events.COMPLETED, handler)
    return handler
