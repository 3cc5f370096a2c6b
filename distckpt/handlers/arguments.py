"""What the handlers' arguments have to be.

Owns the errors of their constructors: they name the argument, what was given and what is expected.
"""

import numbers
from collections.abc import Mapping, MutableMapping, Sequence
from pathlib import Path
from typing import Any

from distckpt.handlers.save_handler import BaseSaveHandler
from distckpt.saving.capture import check_objects

__all__ = ["check_callables", "check_include_self", "check_rank", "check_values"]


def check_values(
    to_save: object, save_handler: object, prefix: object, n_saved: object, score_name: object, pattern: object
) -> None:
    """Check the arguments that are plain values.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: an argument has a wrong value.
    """
    if not isinstance(to_save, Mapping):
        msg = f"Argument `to_save` should be a dictionary, but given {type(to_save)}"
        raise TypeError(msg)
    check_objects(dict(to_save), "state_dict")
    if not (isinstance(save_handler, str | Path | BaseSaveHandler) or callable(save_handler)):
        msg = (
            "Argument `save_handler` should be a string or Path object or callable or inherit from BaseSaveHandler, "
            f"but given {type(save_handler)}"
        )
        raise TypeError(msg)
    for name, value, kind in (
        ("filename_prefix", prefix, str),
        ("score_name", score_name, str | None),
        ("filename_pattern", pattern, str | None),
        ("n_saved", n_saved, numbers.Integral | None),
    ):
        if not isinstance(value, kind) or (name == "n_saved" and isinstance(value, bool)):
            expected = "int | None" if name == "n_saved" else getattr(kind, "__name__", kind)
            msg = f"Argument {name} should be {expected}, but given {type(value)}"
            raise TypeError(msg)
    if isinstance(n_saved, numbers.Integral) and n_saved < 1:
        msg = f"n_saved must be a positive integer or None, got {n_saved}"
        raise ValueError(msg)


def check_callables(score_function: object, global_step_transform: object) -> None:
    """Check the arguments that are functions.

    Raises:
        TypeError: an argument is not callable.
    """
    if score_function is not None and not callable(score_function):
        msg = f"score_function should be a function, got {type(score_function)} instead."
        raise TypeError(msg)
    if global_step_transform is not None and not callable(global_step_transform):
        msg = f"global_step_transform should be a function, got {type(global_step_transform)} instead."
        raise TypeError(msg)


def check_include_self(to_save: Mapping[str, Any], *, include_self: bool) -> None:
    """Check that the handler's own state finds a place among the objects.

    Raises:
        TypeError: `to_save` cannot be changed.
        ValueError: its place is taken.
    """
    if not include_self:
        return
    if not isinstance(to_save, MutableMapping):
        msg = f"If `include_self` is True, then `to_save` must be mutable, but given {type(to_save)}."
        raise TypeError(msg)
    if "checkpointer" in to_save:
        msg = f"Cannot have key 'checkpointer' if `include_self` is True: {to_save}"
        raise ValueError(msg)


def check_rank(rank: object, name: str = "save_on_rank") -> None:
    """Check an argument that is a rank. Whether the job has it is known at the first event only.

    Raises:
        TypeError: it is no int.
        ValueError: it is negative.
    """
    if not isinstance(rank, int) or isinstance(rank, bool):
        msg = f"Argument {name} should be a non-negative integer, but given {type(rank)}"
        raise TypeError(msg)
    if rank < 0:
        msg = f"Argument {name} should be a non-negative integer, but given {rank}"
        raise ValueError(msg)


def check_choice(name: str, given: object, choices: Sequence[object]) -> None:
    """Check an argument that is one of a few.

    Raises:
        ValueError: it is none of them.
    """
    if given not in choices:
        msg = f"Argument {name} should be one of {', '.join(map(repr, choices))}, but given {given!r}"
        raise ValueError(msg)
