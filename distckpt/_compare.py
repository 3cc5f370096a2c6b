"""Compare attributes and memory layouts of many tensors with known ones.

A save reads ten attributes of every tensor while training waits. In C (``_native/compare.c``) that takes half the time.
Type, device, shape, strides and address are read together, and ten times as fast, through DLPack's exchange API.
"""

import operator
import struct
from array import array  # noqa: TC003 - the example uses it
from collections.abc import Sequence
from typing import Any

try:
    from distckpt._native import compare as _native
except ImportError:  # built without a compiler, or for another machine
    _native = None  # type: ignore[assignment]  # a module that may be absent has no type of its own

_CHUNK = 512
"""Number of objects that stay in the processor's cache while one attribute after another is read."""


def have_values(
    objects: list[Any], rows: list[tuple[Any, ...]], attributes: tuple[str, ...], methods: tuple[str, ...]
) -> bool:
    """Return True if each object's attributes, and what its methods return, equal the values in its row.

    Args:
        objects: the objects.
        rows: for each object, one value for each attribute, then one for each method.
        attributes: names of attributes.
        methods: names of methods that take no arguments.

    Raises:
        Exception: an attribute or method has raised it.

    Example:
        >>> have_values([1j, 2j], [(0.0, -1j), (0.0, -2j)], ("real",), ("conjugate",))
        True
    """
    if _native is not None:
        return _native.have_values(objects, rows, attributes, methods)
    if len(objects) != len(rows):
        raise ValueError("there are not as many rows as objects")
    for begin in range(0, len(objects), _CHUNK):
        part, columns = objects[begin : begin + _CHUNK], list(zip(*rows[begin : begin + _CHUNK], strict=True))
        found = [tuple(map(operator.attrgetter(name), part)) for name in attributes]
        found += [tuple(map(operator.methodcaller(name), part)) for name in methods]
        if len(found) != len(columns):
            raise ValueError("a row is no tuple of one value for each attribute and method")
        if found != columns:
            return False
    return True


def has_layouts(api: object) -> bool:
    """Return True if :func:`have_layouts` can use an exchange API; False for None, if torch has no such API."""
    return _native is not None and api is not None


def layout_of(
    begin_bytes: int, code: int, bits: int, device: tuple[int, int], shape: Sequence[int], strides: Sequence[int]
) -> bytes:
    """Return a layout for :func:`have_layouts`.

    Args:
        begin_bytes: offset of the first element in its memory.
        code: DLPack's code of the elements' type.
        bits: of an element.
        device: DLPack's type of the device, and its number.
        shape: sizes.
        strides: in elements.
    """
    return struct.pack(f"={7 + 2 * len(shape)}q", begin_bytes, code, bits, 1, *device, len(shape), *shape, *strides)


def have_layouts(api: object, tensors: list[Any], layouts: list[bytes], addresses: "array[int]") -> bool:
    """Return True if each tensor has the layout at its index.

    Args:
        api: DLPack's exchange API, such as ``torch.Tensor.__dlpack_c_exchange_api__``. See :func:`has_layouts`.
        tensors: objects of the class that offers the API.
        layouts: what :func:`layout_of` returned.
        addresses: an ``array("Q")``; takes the address of each tensor's memory, as the layout's offset tells it. The
            address is of no use for a tensor without elements.

    Raises:
        ValueError: the API has another version than 1, or there are not as many layouts and addresses as tensors.
        Exception: the API has raised it.

    Example:
        >>> import torch
        >>> api, one = getattr(torch.Tensor, "__dlpack_c_exchange_api__", None), torch.ones(2, 3)[1:]
        >>> layout, addresses = layout_of(12, 2, 32, (1, 0), (1, 3), (3, 1)), array("Q", [0])
        >>> not has_layouts(api) or have_layouts(api, [one], [layout], addresses)
        True
    """
    return _native.have_layouts(api, tensors, layouts, addresses)
