"""The objects that are saved or loaded, in mappings and lists nested at will."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

__all__ = ["leaves", "path_to"]


def leaves(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Yield the objects of `to_load` and where they are."""
    if hasattr(tree, "load_state_dict"):
        yield path, tree
    elif isinstance(tree, Mapping):
        for key, item in tree.items():
            yield from leaves(item, (*path, key))
    elif isinstance(tree, Sequence) and not isinstance(tree, str | bytes):
        for index, item in enumerate(tree):
            yield from leaves(item, (*path, index))


def path_to(obj: Any, to_load: Mapping[str, Any]) -> tuple[Any, ...] | None:
    """Return where an object is in `to_load`; None if it is not."""
    return next((path for path, one in leaves(to_load) if obj is not None and one is obj), None)
