"""Stands in for fire: calls one of the given functions, with the arguments of the command line."""

import ast
import contextlib
import sys
from collections.abc import Callable, Mapping
from typing import Any


def Fire(functions: Mapping[str, Callable[..., Any]]) -> None:  # noqa: N802 - the name that programs call
    """Call the function named first; ``--name=value`` follow."""
    name, *options = sys.argv[1:]
    arguments: dict[str, Any] = {}
    for option in options:
        key, _, value = option.removeprefix("--").partition("=")
        arguments[key] = value
        with contextlib.suppress(SyntaxError, ValueError):
            arguments[key] = ast.literal_eval(value)
    functions[name](**arguments)
