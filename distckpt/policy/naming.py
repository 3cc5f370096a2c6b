"""Step, score and pattern <-> the name of a checkpoint file.

Owns what a checkpoint is called and which names may be used at all: pure functions over strings, which
touch no file. Must not know about handlers, ranks or directories.
"""

import os
from collections.abc import Mapping
from typing import Any

__all__ = [
    "TEMP_PREFIX",
    "TEMP_SUFFIX",
    "basename",
    "check_name",
    "default_pattern",
    "format_score",
    "is_temp",
    "printable",
    "render",
]

# Temporary files are hidden and do not end in ".pt", so that a listing for checkpoints never shows one.
TEMP_PREFIX = ".distckpt-"
TEMP_SUFFIX = ".tmp"


def default_pattern(
    *, with_prefix: bool = True, with_score: bool = True, with_score_name: bool = True, with_global_step: bool = True
) -> str:
    """Return the pattern a checkpoint's name is made from when the user gives none.

    Args:
        with_prefix: begin with ``{filename_prefix}_``.
        with_score: carry ``{score}``.
        with_score_name: carry ``{score_name}=`` before the score; needs `with_score`.
        with_global_step: carry ``{global_step}``.

    Raises:
        ValueError: neither score nor global step is asked for, or a score's name without a score.

    Example:
        >>> default_pattern()
        '{filename_prefix}_{name}_{global_step}_{score_name}={score}.{ext}'
    """
    if not (with_global_step or with_score):
        msg = "At least one of with_score and with_global_step should be True."
        raise ValueError(msg)
    if with_score_name and not with_score:
        msg = "If with_score_name is True, with_score should be also True"
        raise ValueError(msg)
    parts = ["{name}"]
    if with_prefix:
        parts.insert(0, "{filename_prefix}")
    if with_global_step:
        parts.append("{global_step}")
    if with_score:
        parts.append("{score_name}={score}" if with_score_name else "{score}")
    return "_".join(parts) + ".{ext}"


def format_score(score: float) -> str:
    """Return a score as it stands in a file name: integral as it is, anything else with four decimals.

    Example:
        >>> format_score(7), format_score(0.12345)
        ('7', '0.1235')
    """
    return f"{score}" if isinstance(score, int) else f"{score:.4f}"


def basename(prefix: str, name: str) -> str:
    """Return the file name's constant part: the prefix, if any, and the name.

    Example:
        >>> basename("best", "model"), basename("", "model")
        ('best_model', 'model')
    """
    return f"{prefix}_{name}" if prefix else name


def render(pattern: str, fields: Mapping[str, Any]) -> str:
    """Fill `pattern` with `fields`.

    Raises:
        KeyError: the pattern names a field that does not exist.
    """
    try:
        return pattern.format(**fields)
    except KeyError as error:
        known = ", ".join(sorted(fields))
        msg = f"{error.args[0]!r} in filename_pattern {pattern!r} is no field of a checkpoint's name; fields: {known}"
        raise KeyError(msg) from error


def is_temp(name: str) -> bool:
    """Tell whether `name` is one of distckpt's own temporary files."""
    return name.startswith(TEMP_PREFIX) and name.endswith(TEMP_SUFFIX)


def printable(text: str) -> str:
    r"""Escape what no encoding can write, such as half of a surrogate pair, so that a log or an error can be written.

    Example:
        >>> printable("caf\udce9.pt")
        'caf\\udce9.pt'
    """
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def check_name(name: str, *, what: str = "filename") -> tuple[str, ...]:
    """Return the components of a file name that stays inside its directory.

    Args:
        name: relative to the checkpoint directory; sub-folders are allowed.
        what: the argument's name, for the error.

    Raises:
        TypeError: it is no string.
        ValueError: it is empty, absolute, holds ``..`` or a NUL, cannot be encoded, or is the name of a
            temporary file of ours.

    Example:
        >>> check_name("fold0/best_3.pt")
        ('fold0', 'best_3.pt')
    """
    if not isinstance(name, str):
        msg = f"Argument {what} should be a string, but given {type(name)}"
        raise TypeError(msg)
    problem = _problem_of(name)
    if problem is not None:
        msg = f"Argument {what} should name a file inside the checkpoint directory, but given {name!r}: {problem}"
        raise ValueError(msg)
    return tuple(part for part in name.split("/") if part not in ("", "."))


def _problem_of(name: str) -> str | None:
    parts = name.split("/")
    problems = (
        ("\0" in name, "it holds a NUL"),
        (not _can_be_encoded(name), "it cannot be encoded as a file name"),
        (name.startswith("/"), "it is absolute"),
        (".." in parts, "'..' would leave the directory"),
        (name == "", "it is empty"),
        (parts[-1] in ("", "."), "it names a directory"),
        (is_temp(parts[-1]), f"{TEMP_PREFIX}*{TEMP_SUFFIX} is kept for temporary files"),
    )
    return next((problem for found, problem in problems if found), None)


def _can_be_encoded(name: str) -> bool:
    try:
        os.fsencode(name)
    except UnicodeEncodeError:
        return False
    return True
