"""The names of checkpoint files: pure functions over strings."""

import os
from collections.abc import Mapping
from typing import Any

# Temporary files are hidden and do not end in ".pt": no listing of checkpoints shows them.
TEMP_PREFIX = ".distckpt-"
TEMP_SUFFIX = ".tmp"
EVENTS_NAME = ".distckpt-events.jsonl"
"""The record of a directory's events: hidden, so that ``*`` and ``*.pt`` do not match it; see docs/events.md."""


def default_pattern(
    with_prefix: bool = True, with_score: bool = True, with_score_name: bool = True, with_global_step: bool = True
) -> str:
    """Return the file name pattern that a handler without ``filename_pattern`` uses.

    Args:
        with_prefix: whether it begins with ``{filename_prefix}_``.
        with_score: whether it has ``{score}``.
        with_score_name: whether it has ``{score_name}=`` before the score.
        with_global_step: whether it has ``{global_step}``.

    Raises:
        ValueError: it would have neither score nor global step, or a score's name without a score.

    Example:
        >>> default_pattern()
        '{filename_prefix}_{name}_{global_step}_{score_name}={score}.{ext}'
    """
    if not (with_global_step or with_score):
        raise ValueError("At least one of with_score and with_global_step should be True.")
    if with_score_name and not with_score:
        raise ValueError("If with_score_name is True, with_score should be also True")
    fields = (
        (with_prefix, "{filename_prefix}"),
        (True, "{name}"),
        (with_global_step, "{global_step}"),
        (with_score, "{score_name}={score}" if with_score_name else "{score}"),
    )
    return "_".join(field for is_in, field in fields if is_in) + ".{ext}"


def format_score(score: float) -> str:
    """Return a score as file names hold it: an int as it is, other numbers with four decimals.

    Example:
        >>> format_score(7), format_score(0.12345)
        ('7', '0.1235')
    """
    return f"{score}" if isinstance(score, int) else f"{score:.4f}"


def basename(prefix: str, name: str) -> str:
    """Return the constant part of a handler's file names: the prefix, if any, and the name.

    Example:
        >>> basename("best", "model"), basename("", "model")
        ('best_model', 'model')
    """
    return f"{prefix}_{name}" if prefix else name


def render(pattern: str, fields: Mapping[str, Any]) -> str:
    """Fill `pattern` with `fields`.

    Raises:
        KeyError: the pattern names an unknown field.

    Example:
        >>> render("{name}_{global_step}.{ext}", {"name": "model", "global_step": 12, "ext": "pt"})
        'model_12.pt'
    """
    try:
        return pattern.format(**fields)
    except KeyError as error:
        known = ", ".join(sorted(fields))
        msg = f"{error.args[0]!r} in filename_pattern {pattern!r} is no field of a checkpoint's name; fields: {known}"
        raise KeyError(msg) from error


def is_temp(name: str) -> bool:
    """Return True if `name` is the name of a temporary file of distckpt."""
    return name.startswith(TEMP_PREFIX) and name.endswith(TEMP_SUFFIX)


def is_reserved(name: str) -> bool:
    """Return True if `name` is the name of a temporary file of distckpt, or of the record of events."""
    return name == EVENTS_NAME or is_temp(name)


def describe_handler(identity: Mapping[str, Any]) -> str:
    """Return a handler's name for people: how its files are called, and what they are ranked by.

    Args:
        identity: the handler's identity, as in a checkpoint's record.

    Example:
        >>> describe_handler({"prefix": "best", "name": "model", "is_scored": True, "score_name": "accuracy"})
        'best_model by accuracy'
    """
    name = basename(str(identity.get("prefix") or ""), str(identity.get("name") or "checkpoint"))
    score = f" by {identity.get('score_name') or 'score'}" if identity.get("is_scored") else " by step"
    order = identity.get("order")
    return f"{name}{score}{f' #{order + 1}' if isinstance(order, int) and order > 0 else ''}"


def printable(text: str) -> str:
    r"""Escape lone surrogates, so that logs and errors can be encoded.

    Example:
        >>> printable("caf\udce9.pt")
        'caf\\udce9.pt'
    """
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def check_name(name: str, *, what: str = "filename") -> tuple[str, ...]:
    """Return the components of a file name that stays inside its directory.

    Args:
        name: the file name, relative to the checkpoint directory. Sub-folders are allowed.
        what: the argument's name, for the error.

    Raises:
        TypeError: the name is no string.
        ValueError: the name is empty, absolute, holds ``..`` or a NUL, cannot be encoded, or is reserved.

    Example:
        >>> check_name("fold0/best_3.pt")
        ('fold0', 'best_3.pt')
    """
    if not isinstance(name, str):
        raise TypeError(f"Argument {what} should be a string, but given {type(name)}")
    problem = _find_problem(name)
    if problem is not None:
        msg = f"Argument {what} should name a file inside the checkpoint directory, but given {name!r}: {problem}"
        raise ValueError(msg)
    return tuple(part for part in name.split("/") if part not in ("", "."))


def _find_problem(name: str) -> str | None:
    parts = name.split("/")
    problems = (
        ("\0" in name, "it holds a NUL"),
        (not _can_be_encoded(name), "it cannot be encoded as a file name"),
        (name.startswith("/"), "it is absolute"),
        (".." in parts, "'..' would leave the directory"),
        (name == "", "it is empty"),
        (parts[-1] in ("", "."), "it names a directory"),
        (is_temp(parts[-1]), f"{TEMP_PREFIX}*{TEMP_SUFFIX} is reserved for temporary files"),
        (parts[-1] == EVENTS_NAME, f"{EVENTS_NAME} is reserved for the record of events"),
    )
    return next((problem for is_so, problem in problems if is_so), None)


def _can_be_encoded(name: str) -> bool:
    try:
        os.fsencode(name)
    except UnicodeEncodeError:
        return False
    return True
