"""Damage to a whole file: flipped bytes, truncation, growth, holes, swapped blocks."""

import itertools
import random
from collections.abc import Iterator

__all__ = ["every_damage", "some_damage"]

_BLOCK = 4096
_MASKS = (0x01, 0xFF)
_MORE = (b"\0", b"x", bytes(_BLOCK))
_HOLES = (16, 512, _BLOCK)


def every_damage(content: bytes) -> Iterator[tuple[str, bytes]]:
    """Yield each damage: a phrase, and the damaged content. What changes nothing is none."""
    for kind in (_flipped, _cut_off, _grown, _holed, _swapped, _turned):
        for what, damaged in kind(content):
            if damaged != content:
                yield what, damaged


def some_damage(content: bytes, num: int, draw: random.Random) -> Iterator[tuple[str, bytes]]:
    """Yield `num` damages, each kind about as often."""
    kinds = [_flipped, _cut_off, _grown, _holed, _swapped, _turned]
    numbers = [sum(1 for _ in kind(content)) for kind in kinds]
    while num > 0:
        which = num % len(kinds)
        at = draw.randrange(numbers[which])
        what, damaged = next(itertools.islice(kinds[which](content), at, None))
        if damaged != content:
            num -= 1
            yield what, damaged


def _flipped(content: bytes) -> Iterator[tuple[str, bytes]]:
    for mask, at in itertools.product(_MASKS, range(len(content))):
        yield f"byte {at} xor {mask}", content[:at] + bytes([content[at] ^ mask]) + content[at + 1 :]


def _cut_off(content: bytes) -> Iterator[tuple[str, bytes]]:
    for length in range(len(content)):
        yield f"cut off at {length}", content[:length]


def _grown(content: bytes) -> Iterator[tuple[str, bytes]]:
    for more in _MORE:
        yield f"{len(more)} bytes at the end", content + more
        yield f"{len(more)} bytes at the beginning", more + content


def _holed(content: bytes) -> Iterator[tuple[str, bytes]]:
    for length in _HOLES:
        for at in range(0, len(content), length):
            holed = content[:at] + bytes(length) + content[at + length :]
            yield f"{length} zeros at {at}", holed[: len(content)]


def _swapped(content: bytes) -> Iterator[tuple[str, bytes]]:
    """Swap any two runs of blocks of equal length: as if two ranks had written each other's share."""
    num = len(content) // _BLOCK
    for length in range(1, num // 2 + 1):
        for first, second in itertools.combinations(range(num - length + 1), 2):
            if second - first >= length:
                a, b, size = first * _BLOCK, second * _BLOCK, length * _BLOCK
                mixed = bytearray(content)
                mixed[a : a + size], mixed[b : b + size] = content[b : b + size], content[a : a + size]
                yield f"blocks {first} and {second} swapped, {length} of them", bytes(mixed)


def _turned(content: bytes) -> Iterator[tuple[str, bytes]]:
    for at in range(_BLOCK, len(content), _BLOCK):
        yield f"what begins at {at} comes first", content[at:] + content[:at]
