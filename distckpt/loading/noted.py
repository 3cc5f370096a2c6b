"""What an object's ``state_dict()`` says, noted without a second copy of large tensors, and put back later.

Small tensors and arrays, numbers and containers are copied. Of a large one its memory, its version and the sum of its
bytes are noted: that tells whether it was changed since, but not from what. Such an object has to be loaded again.
"""

import copy
from collections import deque
from collections.abc import Mapping
from typing import Any

import torch

from distckpt.loading.rollback import copy_state, is_same, load_own_state, own_state

__all__ = ["StateNote"]

_SMALL_BYTES = 64 << 10
_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class _Mark:
    """A large tensor or array, and what tells whether it was changed."""

    def __init__(self, value: Any) -> None:
        self.value = value
        self._said = _fingerprint(value)

    def is_still(self, value: Any) -> bool:
        """Return True if `value` holds the same."""
        return type(value) is type(self.value) and _fingerprint(value) == self._said


class StateNote:
    """What an object's own state was when this was made. Rank-local where the object's ``state_dict`` is.

    Args:
        obj: has ``state_dict`` and ``load_state_dict``.

    Raises:
        Exception: what its ``state_dict()`` raises.
    """

    def __init__(self, obj: Any) -> None:
        self._obj = obj
        self._state = _map_leaves(own_state(obj), _noted)

    def is_changed(self) -> bool:
        """Return True if the object's state is another one now."""
        return not _is_still(self._state, own_state(self._obj))

    def put_back(self) -> bool:
        """Let the object load what was noted.

        Returns:
            False where a large tensor was changed, of which there is no copy; then nothing was loaded.
        """
        if not _are_marks_still(self._state, own_state(self._obj)):
            return False
        load_own_state(self._obj, _map_leaves(self._state, _live))
        return True


def _noted(value: Any) -> Any:
    num_bytes = getattr(value, "nbytes", 0)
    is_large = isinstance(num_bytes, int) and num_bytes > _SMALL_BYTES
    return _Mark(value) if is_large and (isinstance(value, torch.Tensor) or _is_array(value)) else copy_state(value)


def _live(value: Any) -> Any:
    return value.value if isinstance(value, _Mark) else copy_state(value)


def _map_leaves(value: Any, function: Any) -> Any:
    if type(value) in (list, tuple, deque):
        return type(value)(_map_leaves(item, function) for item in value)
    if isinstance(value, dict):
        twin = copy.copy(value)  # of its own type, with its attributes, such as a module's ``_metadata``
        for key, item in value.items():
            twin[key] = _map_leaves(item, function)
        return twin
    return function(value)


def _is_still(noted: Any, value: Any) -> bool:
    if isinstance(noted, _Mark):
        return noted.is_still(value)
    if isinstance(noted, Mapping) and isinstance(value, Mapping):
        return list(noted) == list(value) and all(_is_still(noted[key], value[key]) for key in noted)
    if isinstance(noted, list | tuple | deque) and isinstance(value, list | tuple | deque):
        return len(noted) == len(value) and all(map(_is_still, noted, value))
    return type(noted) is type(value) and is_same(noted, value)


def _are_marks_still(noted: Any, value: Any) -> bool:
    if isinstance(noted, _Mark):
        return noted.is_still(value)
    if isinstance(noted, Mapping):
        return all(
            _are_marks_still(item, value.get(key) if isinstance(value, Mapping) else None)
            for key, item in noted.items()
        )
    if isinstance(noted, list | tuple | deque):
        others = list(value) if isinstance(value, list | tuple | deque) else []
        others += [None] * (len(noted) - len(others))
        return all(map(_are_marks_still, noted, others))
    return True


def _is_array(value: Any) -> bool:
    return hasattr(type(value), "__array_interface__")


def _fingerprint(value: Any) -> tuple[Any, ...]:
    if not isinstance(value, torch.Tensor):
        return (value.shape, str(value.dtype), hash(value.tobytes()))
    about = (tuple(value.shape), value.dtype, str(value.device))
    if (
        value.layout is not torch.strided
        or value.is_quantized
        or value.is_nested
        or value.device.type in ("meta", "xla")
    ):
        return (*about, id(value), value._version)  # noqa: SLF001 - torch's count of what was written to it
    with torch.no_grad():
        plain = torch.view_as_real(value.detach()) if value.is_complex() else value.detach()
        words = plain.view(_WORDS[plain.element_size()]) if plain.dtype is not torch.bool else plain
        return (*about, int(words.sum(dtype=torch.int64)))
