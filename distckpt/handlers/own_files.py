"""Which files in a directory are a Checkpoint's own, and what it can know of them from their names.

Owns the way back from a file's name to step and score. Rank-local; issues no collectives. Layer L5.
"""

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from distckpt.consensus.decision import filename_of
from distckpt.handlers.checkpoint import Checkpoint
from distckpt.naming import is_temp

__all__ = ["OwnFiles", "files_in"]

_NUMBER = r"-?(?:\d+(?:\.\d+)?|inf)"


class _Marker(str):
    """A placeholder in a file name, whatever the format that a pattern asks for."""

    __slots__ = ()

    def __format__(self, spec: str) -> str:
        return str(self)

    def __repr__(self) -> str:
        return str(self)


_STEP, _SCORE, _NAME = (_Marker(f"\0{what}\0") for what in ("step", "score", "name"))
_FIELDS: dict[str, tuple[str, str]] = {_STEP: ("step", _NUMBER), _SCORE: ("score", _NUMBER), _NAME: ("name", r"[^/]+?")}


class OwnFiles:
    """The names that a handler could have given.

    Args:
        handler: whose naming it is.

    Raises:
        KeyError: its pattern names an unknown field.

    Example:
        >>> import tempfile
        >>> from torch import nn
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     own = OwnFiles(Checkpoint({"model": nn.Linear(1, 1)}, folder, filename_prefix="last"))
        >>> own.is_own("last_model_12.pt"), own.is_own("best_model_12.pt"), own.is_own("last_model_x.pt")
        (True, False, False)
    """

    def __init__(self, handler: Checkpoint) -> None:
        rules = handler._rules()  # noqa: SLF001 - a friend's: how it names its files
        if not handler.to_save:  # a ModelCheckpoint learns what it saves when it is called
            rules = replace(rules, name=_NAME)
        self._is_scored = handler.score_function is not None
        self._has_transform = handler.global_step_transform is not None
        has_step = self._has_transform or not self._is_scored
        name = filename_of(rules, score=_SCORE if self._is_scored else None, global_step=_STEP if has_step else None)
        self._regex = re.compile(_regex_of(name))
        self.is_nested = "/" in name

    def is_own(self, name: str) -> bool:
        """Tell whether the handler could have given this name."""
        return self._regex.fullmatch(name) is not None

    def priority_of(self, name: str, *, is_mid_epoch: bool) -> int | float | None:
        """Return the priority of a file of the handler's, as far as its name tells it; None if it does not.

        Args:
            name: the file's.
            is_mid_epoch: whether it was saved in the middle of an epoch. Where steps are counted in epochs, half of
                one is taken off then, as :meth:`Checkpoint.save_early` does: the end of that epoch replaces it.
        """
        found = self._regex.fullmatch(name)
        told = None if found is None else found.groupdict().get("score" if self._is_scored else "step")
        if told is None:
            return None
        value = int(told) if re.fullmatch(r"-?\d+", told) else float(told)
        return value - 0.5 if is_mid_epoch and self._has_transform and not self._is_scored else value

    def history_of(
        self, resumed: str, others: Sequence[str], *, n_saved: int | None, is_mid_epoch: bool
    ) -> list[tuple[int | float, str]] | None:
        """Return what a handler that resumes from `resumed` has saved, as far as the names tell it.

        Args:
            resumed: the file that it resumes from; always part of it.
            others: its other files that are whole, as far as is known.
            n_saved: how many are kept. More than these are nobody's any more: they are left alone.
            is_mid_epoch: whether `resumed` was saved in the middle of an epoch.

        Returns:
            Priorities and names, lowest first; None where the name of `resumed` does not tell its own.
        """
        priority = self.priority_of(resumed, is_mid_epoch=is_mid_epoch)
        if priority is None:
            return None
        known = [(self.priority_of(name, is_mid_epoch=False), name) for name in others if name != resumed]
        entries = [
            (value, name) for value, name in known if value is not None and (self._is_scored or value < priority)
        ]
        entries.sort()
        if n_saved is not None:
            entries = entries[len(entries) - n_saved + 1 :] if n_saved <= len(entries) else entries
        return sorted([*entries, (priority, resumed)])


def files_in(directory: Path, ext: str, *, is_nested: bool) -> list[str]:
    """List the files with an extension; none where the directory is missing.

    Args:
        directory: where to look.
        ext: without its dot.
        is_nested: whether to look into folders in it too.

    Raises:
        NotADirectoryError: it is a file.
    """
    if not directory.exists():
        return []
    found = directory.rglob("*") if is_nested else directory.iterdir()
    named = [path for path in found if path.name.endswith(f".{ext}") and not is_temp(path.name) and path.is_file()]
    return sorted(path.relative_to(directory).as_posix() for path in named)


def _regex_of(name: str) -> str:
    """Turn a name with markers into a regular expression; a field that comes again has to be the same again."""
    regex, seen = "", set[str]()
    for part in re.split("(\0[a-z]+\0)", name):
        field = _FIELDS.get(part)
        if field is None:
            regex += re.escape(part)
        elif field[0] in seen:
            regex += f"(?P={field[0]})"
        else:
            seen.add(field[0])
            regex += f"(?P<{field[0]}>{field[1]})"
    return regex
