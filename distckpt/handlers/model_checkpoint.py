"""The ModelCheckpoint handler: a Checkpoint whose objects are arguments of the call."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ignite.engine import Engine

from distckpt.handlers.arguments import check_include_self
from distckpt.handlers.checkpoint import Checkpoint
from distckpt.handlers.compat import ARCHIVED, MODEL_CHECKPOINT_ORDER, accept_older_order, deprecated
from distckpt.handlers.disk_saver import DiskSaver, ShareWrite
from distckpt.handlers.save_handler import WhenBusy, directory_of
from distckpt.handlers.save_intent import UserFacts, name_of
from distckpt.policy.policies import Policy
from distckpt.saving.capture import check_objects

_PATTERN_AT = MODEL_CHECKPOINT_ORDER.index("filename_pattern")
_UNSET: Any = object()


def _older_order(args: tuple[Any, ...]) -> tuple[str, ...]:
    """Return the order of 0.4.13, or that of releases before 0.4.9, with include_self in the pattern's place."""
    if len(args) > _PATTERN_AT and isinstance(args[_PATTERN_AT], bool):
        return (*MODEL_CHECKPOINT_ORDER[:_PATTERN_AT], "include_self")
    return MODEL_CHECKPOINT_ORDER


def _is_older(given: dict[str, Any]) -> bool:
    """Return True if types do not fit today's order: an interval, a function or a count is in the wrong place."""
    return (
        isinstance(given.get("score_function"), int)
        or callable(given.get("score_name"))
        or not isinstance(given.get("atomic", True), bool)
        or isinstance(given.get("n_saved"), str)
    )


class ModelCheckpoint(Checkpoint):
    """Handler that saves objects to a local directory. The objects are given where the handler is attached.

    It is called with ``(engine, to_save)``. The arguments are those of :class:`Checkpoint`, and of the
    :class:`DiskSaver` that it makes.

    Args:
        dirname: the directory.
        filename_prefix: see :class:`Checkpoint`, as for `score_function` to `n_saved` and `global_step_transform` to
            `timeout_s`.
        atomic: see :class:`DiskSaver`, as for `require_empty`, `create_dir`, and `background` to `kwargs`.
        archived: deprecated, without effect.
        save_interval: deprecated; 1 is accepted, other values are errors: filter the event instead.
        save_as_state_dict: deprecated; has to be True.

    Example:
        >>> import os, tempfile
        >>> from torch import nn
        >>> from ignite.engine import Engine, Events
        >>> trainer = Engine(lambda engine, batch: None)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     handler = ModelCheckpoint(folder, "myprefix", n_saved=2)
        ...     event = Events.EPOCH_COMPLETED(every=2)
        ...     trainer.add_event_handler(event, handler, {"mymodel": nn.Linear(3, 3)}) and None
        ...     trainer.run([0, 1, 2, 3, 4], max_epochs=6) and None
        ...     sorted(os.listdir(folder))
        ['myprefix_mymodel_20.pt', 'myprefix_mymodel_30.pt']
    """

    @accept_older_order(_older_order, _is_older)
    def __init__(
        self,
        dirname: str | Path,
        filename_prefix: str = "",
        score_function: Callable[[Engine], int | float] | None = None,
        score_name: str | None = None,
        n_saved: int | None = 1,
        atomic: bool = True,
        require_empty: bool = True,
        create_dir: bool = True,
        global_step_transform: Callable[..., int] | None = None,
        filename_pattern: str | None = None,
        include_self: bool = False,
        greater_or_equal: bool = False,
        save_on_rank: int = 0,
        *,
        archived: Any = _UNSET,
        save_interval: int | None = None,
        save_as_state_dict: Any = _UNSET,
        keep: Sequence[Policy] | None = None,
        score_rule: str = "mean",
        timeout_s: float | None = None,
        background: bool = False,
        when_busy: WhenBusy = "wait",
        overlap_copy: bool = True,
        own_memory: bool = False,
        share_write: ShareWrite = None,
        check_replicas: bool = False,
        record_events: bool | None = None,
        **kwargs: Any,
    ) -> None:
        if isinstance(filename_pattern, bool) or isinstance(include_self, str):
            # Given by position in the order that has include_self first.
            pattern: Any = include_self
            filename_pattern, include_self = (pattern if isinstance(pattern, str) else None), bool(filename_pattern)
        _check_older(archived, save_interval, save_as_state_dict)
        saver = DiskSaver(
            dirname,
            atomic=atomic,
            create_dir=create_dir,
            require_empty=require_empty,
            save_on_rank=save_on_rank,
            background=background,
            when_busy=when_busy,
            overlap_copy=overlap_copy,
            own_memory=own_memory,
            share_write=share_write,
            check_replicas=check_replicas,
            record_events=record_events,
            **kwargs,
        )
        super().__init__(
            to_save={},
            save_handler=saver,
            filename_prefix=filename_prefix,
            score_function=score_function,
            score_name=score_name,
            n_saved=n_saved,
            global_step_transform=global_step_transform,
            filename_pattern=filename_pattern,
            include_self=include_self,
            greater_or_equal=greater_or_equal,
            save_on_rank=save_on_rank,
            keep=keep,
            score_rule=score_rule,
            timeout_s=timeout_s,
        )

    def __call__(self, engine: Engine, to_save: Mapping[str, Any]) -> None:
        """Collective. Save `to_save` if this event calls for it; see :meth:`Checkpoint.__call__`.

        Raises:
            RuntimeError: `to_save` is empty.
            TypeError: an object has no ``state_dict``.
        """
        self.to_save = to_save
        super().__call__(engine)

    @property
    def last_checkpoint(self) -> Path | None:
        """The path of the kept checkpoint of highest priority; None if there is none."""
        last = super().last_checkpoint
        if last is not None and directory_of(self.save_handler) is None:
            raise RuntimeError(f"Internal error, save_handler should be DiskSaver, but has {type(self.save_handler)}.")
        return None if last is None else Path(last)

    def _object_names(self) -> frozenset[str]:
        return frozenset(self._engines.names | ({name_of(self.to_save)} if self.to_save else set()))

    def _find_facts(self, engine: Engine) -> UserFacts:
        # Check here, in the phase that reports every rank's error to every rank, and not earlier.
        if len(self.to_save) == 0:
            raise RuntimeError("No objects to checkpoint found.")
        check_objects(dict(self.to_save), "state_dict")
        check_include_self(self.to_save, include_self=self.include_self)
        return super()._find_facts(engine)


def _check_older(archived: object, save_interval: int | None, save_as_state_dict: object) -> None:
    if archived is not _UNSET:
        deprecated(ARCHIVED, stacklevel=5)
    if save_interval is not None:
        msg = (
            "Argument save_interval is deprecated and should be None. Please, use events filtering instead, "
            "e.g. Events.ITERATION_STARTED(every=1000)"
        )
        if save_interval != 1:
            raise ValueError(msg)
        deprecated(msg, stacklevel=5)
    if save_as_state_dict is not _UNSET:
        msg = "Argument save_as_state_dict is deprecated and should be True."
        if not save_as_state_dict:
            raise ValueError(msg)
        deprecated(msg, stacklevel=5)
