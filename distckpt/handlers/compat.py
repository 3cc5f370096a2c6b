"""What programs written for ignite may pass or override, in pytorch-ignite 0.4 or today."""

import functools
import inspect
import warnings
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., None])

_FIRST = ("score_function", "score_name", "n_saved")
_LAST = ("archived", "filename_pattern", "include_self", "greater_or_equal", "save_on_rank")
CHECKPOINT_ORDER = ("to_save", "save_handler", "filename_prefix", *_FIRST, "global_step_transform", *_LAST)
"""The order of Checkpoint's arguments in 0.4.13."""
MODEL_CHECKPOINT_ORDER = (
    *("dirname", "filename_prefix", "save_interval", *_FIRST),
    *("atomic", "require_empty", "create_dir", "save_as_state_dict", "global_step_transform", *_LAST),
)
"""The order of ModelCheckpoint's arguments in 0.4.13."""
CHECKPOINT_OVERRIDES = {
    "_setup_checkpoint": "Put objects into `to_save` whose `state_dict` returns what is to be saved.",
    "_check_objects": "Give the objects in `to_save` a `state_dict`, or wrap them in a class that has one.",
    "_get_filename_pattern": "Pass `filename_pattern`.",
    "_check_lt_n_saved": "Pass `n_saved`, or a `score_function`.",
    "_compare_fn": "Pass `greater_or_equal`, or a `score_function`.",
}
"""Methods of ignite's Checkpoint that are never called here, and what to do instead."""
DISK_SAVER_OVERRIDES = dict.fromkeys(
    ("_save_native", "_save_xla"),
    "Override `_save_func(checkpoint, path, func)` instead: every save calls it.",
)
"""Methods of ignite's DiskSaver that are never called here, and what to do instead."""
ARCHIVED = "Argument archived is deprecated and has no effect: checkpoints are not compressed"


def deprecated(message: str, *, stacklevel: int = 3) -> None:
    """Emit a DeprecationWarning."""
    warnings.warn(message, DeprecationWarning, stacklevel=stacklevel)


def refuse_overrides(one: object, instead: Mapping[str, str]) -> None:
    """Raise TypeError if a class, or an object, has a method which ignite calls and distckpt does not.

    `instead` says what to do instead, by the method's name.
    """
    kind = one if isinstance(one, type) else type(one)
    for name, advice in instead.items():
        if name in vars(one) or hasattr(kind, name):
            msg = f"{kind.__qualname__} overrides `{name}`, which ignite calls and distckpt does not. {advice}"
            raise TypeError(msg)


def accept_older_order(
    older: tuple[str, ...] | Callable[[tuple[Any, ...]], tuple[str, ...]], is_older: Callable[[dict[str, Any]], bool]
) -> Callable[[F], F]:
    """Let a constructor accept its positional arguments in an older order too, with a DeprecationWarning.

    Args:
        older: the names of the positional arguments in the older order, without ``self``; or a function that returns
            them from the arguments.
        is_older: takes the positional arguments by today's names, and returns True if only the older order makes sense.
    """

    def decorate(init: F) -> F:
        newer = tuple(inspect.signature(init).parameters)[1:]

        @functools.wraps(init)
        def wrapper(self: object, *args: Any, **kwargs: Any) -> None:
            names = older(args) if callable(older) else older
            if len(args) > len(names) or not is_older(dict(zip(newer, args, strict=False))):
                init(self, *args, **kwargs)
                return
            given = dict(zip(names, args, strict=False))
            deprecated(
                f"Arguments were given in an older release's order; today's order is {', '.join(newer)}. "
                "Please pass them by name."
            )
            twice = sorted(given.keys() & kwargs.keys())
            if twice:
                raise TypeError(f"{init.__qualname__}() got multiple values for argument '{twice[0]}'")
            init(self, **given, **kwargs)

        return wrapper  # type: ignore[return-value]  # functools.wraps keeps the signature

    return decorate
