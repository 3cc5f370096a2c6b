"""Walk through the objects in ``to_save`` or ``to_load``: nested mappings and sequences."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any


def iter_objects(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Yield the path and the object of each leaf."""
    if hasattr(tree, "load_state_dict"):
        yield path, tree
    elif isinstance(tree, Mapping):
        for key, item in tree.items():
            yield from iter_objects(item, (*path, key))
    elif isinstance(tree, Sequence) and not isinstance(tree, str | bytes):
        for index, item in enumerate(tree):
            yield from iter_objects(item, (*path, index))


def find_path(obj: Any, tree: Mapping[str, Any]) -> tuple[Any, ...] | None:
    """Return the path to an object in a tree; None if it is not there."""
    return next((path for path, leaf in iter_objects(tree) if obj is not None and leaf is obj), None)
