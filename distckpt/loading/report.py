"""Which keys a load passed over, and how the mismatches of several objects become one report or error.

A module of its own because both the dry run and the load need it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from distckpt.errors import StateMismatchError, state_mismatch_error, type_names


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadReport:
    """The keys that a load with ``strict=False`` passed over. The report is false if there are none.

    Attributes:
        missing: keys that an object has and the checkpoint lacks, after the object's name: ``model.layer.bias``.
        unexpected: keys that the checkpoint has and the object lacks.
        mismatched: keys whose shape or type differs. torch refuses them, strict or not.

    Example:
        >>> LoadReport(missing=("model.bias",))
        LoadReport(missing=('model.bias',), unexpected=(), mismatched=())
    """

    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    mismatched: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        """Return True if any key was passed over."""
        return bool(self.missing or self.unexpected or self.mismatched)

    def with_prefix(self, name: str) -> "LoadReport":
        """Return the report with an object's name before its keys."""
        kinds = (self.missing, self.unexpected, self.mismatched)
        missing, unexpected, mismatched = (tuple(f"{name}.{key}" if name else key for key in keys) for keys in kinds)
        return LoadReport(missing=missing, unexpected=unexpected, mismatched=mismatched)


def join_reports(reports: Sequence[LoadReport | StateMismatchError]) -> LoadReport:
    """Return one report with the keys of all."""
    return LoadReport(
        missing=tuple(key for one in reports for key in one.missing),
        unexpected=tuple(key for one in reports for key in one.unexpected),
        mismatched=tuple(key for one in reports for key in one.mismatched),
    )


def join_mismatches(mismatches: Sequence[tuple[str, StateMismatchError]]) -> StateMismatchError:
    """Return one error for one or more objects' errors, each given with the object's name.

    A single error is returned as it is. The error of several begins as the first does, and is of all their types.
    """
    (name, first), *others = mismatches
    if not others:
        return first
    lines = [f"{first} (that is {name!r})", *(f"{other!r}: {error}" for other, error in others)]
    errors = [error for _, error in mismatches]
    total = join_reports(errors)
    kinds = [kind for error in errors for kind in type_names(error)]
    return state_mismatch_error("\n".join(lines), kinds, total.missing, total.unexpected, total.mismatched)
