"""Arguments in the order of ignite's older release -> today's.

Owns what a program written for pytorch-ignite 0.4.x may pass that 0.5.5 does not take. Must not know what the
arguments do.
"""

import functools
import inspect
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

__all__ = ["accept_older_order", "deprecated"]

F = TypeVar("F", bound=Callable[..., None])
Values = dict[str, Any]


def deprecated(message: str, *, stacklevel: int = 3) -> None:
    """Warn that an older form was used."""
    warnings.warn(message, DeprecationWarning, stacklevel=stacklevel)


def accept_older_order(
    older: tuple[str, ...] | Callable[[tuple[Any, ...]], tuple[str, ...]], is_older: Callable[[Values], bool]
) -> Callable[[F], F]:
    """Let a constructor take its positional arguments in an older order too.

    Args:
        older: names of the positional arguments in the older release, without ``self``; or a function that finds
            them from the arguments as given.
        is_older: told today's names of the positional arguments as given, says whether they make sense only in
            the older order.
    """

    def decorate(init: F) -> F:
        newer = tuple(inspect.signature(init).parameters)[1:]

        @functools.wraps(init)
        def wrapper(self: object, *args: Any, **kwargs: Any) -> None:
            names = older(args) if callable(older) else older
            if len(args) <= len(names) and is_older(dict(zip(newer, args, strict=False))):
                given = dict(zip(names, args, strict=False))
                deprecated(
                    f"Arguments were given in an older release's order; today's order is {', '.join(newer)}. "
                    "Please pass them by name."
                )
                twice = sorted(given.keys() & kwargs.keys())
                if twice:
                    msg = f"{init.__qualname__}() got multiple values for argument '{twice[0]}'"
                    raise TypeError(msg)
                init(self, **given, **kwargs)
            else:
                init(self, *args, **kwargs)

        return wrapper  # type: ignore[return-value]  # functools.wraps keeps the signature

    return decorate
