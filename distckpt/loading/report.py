"""What of a checkpoint fitted the objects, and what did not.

Owns the report of a load, and how several objects' misfits become one error. Must not know how they were found.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from distckpt.errors import StateMismatchError, state_mismatch_error

__all__ = ["LoadReport", "all_in_one", "joined"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadReport:
    """What was left as it was by a load that is not strict.

    Attributes:
        missing: keys that an object has and the checkpoint lacks, behind the object's name: ``model.layer.bias``.
        unexpected: keys that the checkpoint has for an object which lacks them.
        mismatched: keys whose shape or kind is another one; torch refuses them, strict or not.

    Example:
        >>> LoadReport(missing=("model.bias",))
        LoadReport(missing=('model.bias',), unexpected=(), mismatched=())
    """

    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    mismatched: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        """Tell whether there is anything to report."""
        return bool(self.missing or self.unexpected or self.mismatched)

    def under(self, name: str) -> "LoadReport":
        """Return the same report, with an object's name before its keys."""
        kinds = (self.missing, self.unexpected, self.mismatched)
        missing, unexpected, mismatched = (tuple(f"{name}.{key}" if name else key for key in keys) for keys in kinds)
        return LoadReport(missing=missing, unexpected=unexpected, mismatched=mismatched)


def joined(reports: Sequence[LoadReport | StateMismatchError]) -> LoadReport:
    """Return one report of all."""
    return LoadReport(
        missing=tuple(key for one in reports for key in one.missing),
        unexpected=tuple(key for one in reports for key in one.unexpected),
        mismatched=tuple(key for one in reports for key in one.mismatched),
    )


def all_in_one(found: Sequence[tuple[str, StateMismatchError]]) -> StateMismatchError:
    """Make one error of all misfits.

    Args:
        found: at least one; each with the name of its object.

    Returns:
        The only one as it is; else an error that begins as the first does, lists all, and is of all their types.
    """
    (name, first), *others = found
    if not others:
        return first
    lines = [f"{first} (that is {name!r})", *(f"{other!r}: {error}" for other, error in others)]
    kinds = [base.__name__ for _, error in found for base in type(error).__mro__]
    total = joined([error for _, error in found])
    return state_mismatch_error("\n".join(lines), kinds, total.missing, total.unexpected, total.mismatched)
