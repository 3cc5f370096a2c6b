"""Saving objects that are named when the handler is attached.

Owns :class:`ModelCheckpoint`.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ignite.engine import Engine

from distckpt.handlers.arguments import check_include_self
from distckpt.handlers.checkpoint import Checkpoint, UserFacts, name_of
from distckpt.handlers.checkpoint_history import ON_DISK
from distckpt.handlers.compat import accept_older_order, deprecated
from distckpt.handlers.disk_saver import DiskSaver, ShareWrite, WhenBusy
from distckpt.saving.capture import check_objects

__all__ = ["ModelCheckpoint"]

_OLDER_ORDER = (
    "dirname",
    "filename_prefix",
    "save_interval",
    "score_function",
    "score_name",
    "n_saved",
    "atomic",
    "require_empty",
    "create_dir",
    "save_as_state_dict",
    "global_step_transform",
    "archived",
    "filename_pattern",
    "include_self",
    "greater_or_equal",
    "save_on_rank",
)
_PATTERN_AT = _OLDER_ORDER.index("filename_pattern")
_UNSET: Any = object()


def _older_order(args: tuple[Any, ...]) -> tuple[str, ...]:
    """Return the order of 0.4.13, or that of releases before 0.4.9, where include_self stood in the pattern's place."""
    if len(args) > _PATTERN_AT and isinstance(args[_PATTERN_AT], bool):
        return (*_OLDER_ORDER[:_PATTERN_AT], "include_self")
    return _OLDER_ORDER


def _is_older(given: dict[str, Any]) -> bool:
    """Tell from types that stand at the wrong place in today's order: an interval, a function, a count."""
    return (
        isinstance(given.get("score_function"), int)
        or callable(given.get("score_name"))
        or not isinstance(given.get("atomic", True), bool)
        or isinstance(given.get("n_saved"), str)
    )


class ModelCheckpoint(Checkpoint):
    """Handler that saves objects to a local directory; they are named where it is attached.

    It is called with ``(engine, to_save)``.

    Args:
        dirname: the directory.
        filename_prefix: leads the file name.
        score_function: see :class:`Checkpoint`.
        score_name: see :class:`Checkpoint`.
        n_saved: see :class:`Checkpoint`.
        atomic: see :class:`DiskSaver`.
        require_empty: see :class:`DiskSaver`.
        create_dir: see :class:`DiskSaver`.
        global_step_transform: see :class:`Checkpoint`.
        filename_pattern: see :class:`Checkpoint`.
        include_self: see :class:`Checkpoint`.
        greater_or_equal: see :class:`Checkpoint`.
        save_on_rank: see :class:`Checkpoint`.
        archived: without effect, deprecated.
        save_interval: deprecated; 1 is accepted, anything else is an error: filter the event instead.
        save_as_state_dict: deprecated; has to be True.
        score_rule: see :class:`Checkpoint`.
        timeout_s: see :class:`Checkpoint`.
        background: see :class:`DiskSaver`.
        when_busy: see :class:`DiskSaver`.
        overlap_copy: see :class:`DiskSaver`.
        own_memory: see :class:`DiskSaver`.
        share_write: see :class:`DiskSaver`.
        check_replicas: see :class:`DiskSaver`.
        kwargs: keyword arguments of ``torch.save``.

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
        score_rule: str = "mean",
        timeout_s: float | None = None,
        background: bool = False,
        when_busy: WhenBusy = "wait",
        overlap_copy: bool = True,
        own_memory: bool = False,
        share_write: ShareWrite = None,
        check_replicas: bool = False,
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
            score_rule=score_rule,
            timeout_s=timeout_s,
        )

    def _names(self) -> frozenset[str]:
        called = {name_of(self.to_save)} if self.to_save else set()
        return frozenset(self._known.names | called)

    @property
    def last_checkpoint(self) -> Path | None:
        """The path of the kept checkpoint of highest priority; None when there is none."""
        if not self._saved:
            return None
        if not isinstance(self.save_handler, ON_DISK):
            msg = f"Internal error, save_handler should be DiskSaver, but has {type(self.save_handler)}."
            raise RuntimeError(msg)  # noqa: TRY004 - ignite's type
        return self._path_of(self._saved[-1].filename)

    def __call__(self, engine: Engine, to_save: Mapping[str, Any]) -> None:
        """Collective. Save `to_save` if this event deserves it; see :meth:`Checkpoint.__call__`.

        Raises:
            RuntimeError: there is nothing to save.
            TypeError: an object has no ``state_dict``.
        """
        self.to_save = to_save
        super().__call__(engine)

    def _find_facts(self, engine: Engine) -> UserFacts:
        # In the phase where every rank hears of every rank's error, not before it.
        if len(self.to_save) == 0:
            msg = "No objects to checkpoint found."
            raise RuntimeError(msg)
        check_objects(dict(self.to_save), "state_dict")
        check_include_self(self.to_save, include_self=self.include_self)
        return super()._find_facts(engine)


def _check_older(archived: object, save_interval: int | None, save_as_state_dict: object) -> None:
    if archived is not _UNSET:
        deprecated("Argument archived is deprecated and has no effect: checkpoints are not compressed", stacklevel=5)
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
