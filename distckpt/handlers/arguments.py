"""Checks of the handlers' arguments. An error names the argument, the given value, and what is expected."""

import numbers
from collections.abc import Mapping, MutableMapping, Sequence
from pathlib import Path
from typing import Any

from distckpt._values import check_timeout
from distckpt.handlers.save_handler import BaseSaveHandler
from distckpt.handlers.save_intent import Settings
from distckpt.policy.policies import check_policies
from distckpt.saving.capture import check_objects

_KINDS: dict[str, Any] = {
    "filename_prefix": str,
    "score_name": str | None,
    "filename_pattern": str | None,
    "n_saved": numbers.Integral | None,
}


def check_settings(handler: Settings) -> None:
    """Check the arguments of a Checkpoint.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: an argument has a wrong value.
    """
    if not isinstance(handler.to_save, Mapping):
        raise TypeError(f"Argument `to_save` should be a dictionary, but given {type(handler.to_save)}")
    check_objects(dict(handler.to_save), "state_dict")
    if not (isinstance(handler.save_handler, str | Path | BaseSaveHandler) or callable(handler.save_handler)):
        raise TypeError(
            "Argument `save_handler` should be a string or Path object or callable or inherit from BaseSaveHandler, "
            f"but given {type(handler.save_handler)}"
        )
    for name, kind in _KINDS.items():
        value = getattr(handler, name)
        if not isinstance(value, kind) or (name == "n_saved" and isinstance(value, bool)):
            expected = "int | None" if name == "n_saved" else getattr(kind, "__name__", kind)
            raise TypeError(f"Argument {name} should be {expected}, but given {type(value)}")
    if handler.n_saved is not None and handler.n_saved < 1:
        raise ValueError(f"n_saved must be a positive integer or None, got {handler.n_saved}")
    if handler.keep is not None:
        is_scored = handler.score_function is not None or handler.score_name is not None
        check_policies(handler.keep, is_scored=is_scored)
        if handler.n_saved != 1:
            msg = (
                f"Give n_saved or keep, but given n_saved={handler.n_saved} and keep={handler.keep}: LastN and BestN do"
            )
            raise ValueError(f"{msg} what n_saved does")
    for name in ("score_function", "global_step_transform"):
        function = getattr(handler, name)
        if function is not None and not callable(function):
            raise TypeError(f"{name} should be a function, got {type(function)} instead.")
    check_include_self(handler.to_save, include_self=handler.include_self)
    check_rank(handler.save_on_rank)
    check_timeout(handler.timeout_s)


def check_include_self(to_save: Mapping[str, Any], *, include_self: bool) -> None:
    """Check that the handler's own state can be added to the objects.

    Raises:
        TypeError: `to_save` is immutable.
        ValueError: `to_save` has the key ``checkpointer``.
    """
    if not include_self:
        return
    if not isinstance(to_save, MutableMapping):
        raise TypeError(f"If `include_self` is True, then `to_save` must be mutable, but given {type(to_save)}.")
    if "checkpointer" in to_save:
        raise ValueError(f"Cannot have key 'checkpointer' if `include_self` is True: {to_save}")


def check_rank(rank: Any, name: str = "save_on_rank") -> int:
    """Return the value of an argument that is a rank. Whether the job has that rank is checked at the first event.

    Raises:
        TypeError: `rank` is not an integer.
        ValueError: `rank` is negative.
    """
    if not isinstance(rank, numbers.Integral) or isinstance(rank, bool):
        raise TypeError(f"Argument {name} should be a non-negative integer, but given {type(rank)}")
    if rank < 0:
        raise ValueError(f"Argument {name} should be a non-negative integer, but given {rank}")
    return int(rank)


def check_choice(name: str, value: object, choices: Sequence[object]) -> None:
    """Check an argument that has to be one of `choices`.

    Raises:
        ValueError: `value` is none of them.
    """
    if value not in choices:
        raise ValueError(f"Argument {name} should be one of {', '.join(map(repr, choices))}, but given {value!r}")
