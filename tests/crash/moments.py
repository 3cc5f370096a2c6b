"""Random moments to stop a job at."""

import random


class Turns:
    """The numbers below `count` in random order, again and again: a few trials have different ones.

    Args:
        count: of the numbers.
        draw: decides the order.

    Example:
        >>> turns = Turns(3, random.Random(0))
        >>> sorted(turns.take() for _ in range(3)), sorted(turns.take() for _ in range(3))
        ([0, 1, 2], [0, 1, 2])
    """

    def __init__(self, count: int, draw: random.Random) -> None:
        self._count = count
        self._draw = draw
        self._left: list[int] = []

    def take(self) -> int:
        """Return the next number."""
        self._left = self._left or self._draw.sample(range(self._count), self._count)
        return self._left.pop()
