"""From raw results to medians, their spread, and ratios to the limits of the same round."""

import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from ci.savebench.limits import LIMITS
from ci.savebench.world import Measured


@dataclass(frozen=True, slots=True)
class Spread:
    """A median, and the smallest and largest value."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float]) -> "Spread":
        """Return the spread of values."""
        listed = list(values)
        return cls(statistics.median(listed), min(listed), max(listed))


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A contestant's medians over the rounds. A ratio is the median of the rounds' ratios."""

    name: str
    stall_s: Spread
    durable_s: Spread
    load_s: Spread
    lost_s: Spread
    stall_by_memcpy: float
    stall_by_share: float
    stall_by_tensors: float
    durable_by_write: float
    load_by_read: float
    read_by_size: float
    file_by_size: float
    extra_bytes: int | None
    step_ratio: float
    num_torn: int


def limits_of(measured: Measured) -> dict[str, Spread]:
    """Return the limits, without the warm-up round."""
    rounds = _timed(measured.rounds.get(LIMITS, {})).values()
    return {name: Spread.of(one[name] for one in rounds) for name in next(iter(rounds), {})}


def rows_of(measured: Measured) -> list[Row]:
    """Return a row for each contestant with results of a timed round."""
    found = []
    limits = measured.rounds.get(LIMITS, {})
    for name, rounds in measured.rounds.items():
        timed = {number: one for number, one in _timed(rounds).items() if number in limits}
        if name != LIMITS and timed:
            found.append(_row(measured, name, timed, num_torn=sum(not one["is_snapshot"] for one in rounds.values())))
    return found


def _timed(rounds: dict[int, dict[str, Any]]) -> dict[int, dict[str, Any]]:
    return {number: one for number, one in sorted(rounds.items()) if number}


def _row(measured: Measured, name: str, rounds: dict[int, dict[str, Any]], *, num_torn: int) -> Row:
    limits = measured.rounds[LIMITS]
    numbers = list(rounds.values())

    def ratio(value: str, *names: str) -> float:
        found = (one[value] / sum(limits[number][name] for name in names) for number, one in rounds.items())
        return Spread.of(found).median

    return Row(
        name=name,
        stall_s=Spread.of(one["stall_s"] for one in numbers),
        durable_s=Spread.of(one["durable_s"] for one in numbers),
        load_s=Spread.of(one["load_s"] for one in numbers),
        lost_s=Spread.of(one["lost_s"] for one in numbers),
        stall_by_memcpy=ratio("stall_s", "memcpy_s"),
        stall_by_share=ratio("stall_s", "memcpy_share_s"),
        stall_by_tensors=ratio("stall_s", "tensors_share_s"),
        durable_by_write=ratio("durable_s", "write_s"),
        load_by_read=Spread.of(
            one["load_s"] / (one["raw_read_s"] + limits[number]["memcpy_s"]) for number, one in rounds.items()
        ).median,
        read_by_size=statistics.median(one["read_bytes"] / one["checkpoint_bytes"] for one in numbers),
        file_by_size=statistics.median(one["checkpoint_bytes"] / measured.num_bytes for one in numbers),
        extra_bytes=measured.extra_bytes.get(name),
        step_ratio=statistics.median(
            statistics.median(one["steps_during_s"]) / statistics.median(one["steps_without_s"]) for one in numbers
        ),
        num_torn=num_torn,
    )
