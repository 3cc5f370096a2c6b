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


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardedRow:
    """What is measured of a contestant beside its :class:`Row`, where each rank has a shard of the state.

    Attributes:
        load_by_read: load relative to a raw read and one memcpy of a rank's share.
        written_by_size: bytes that all ranks wrote, relative to the state.
        received_bytes: bytes that all ranks received from each other until the save was durable.
        consolidate_s: making one file of the checkpoint; None if it is one file, or was not measured.
    """

    load_by_read: float
    written_by_size: float
    received_bytes: float
    consolidate_s: Spread | None


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadRow:
    """A contestant's loads by a job of another size."""

    load_s: Spread
    load_by_read: float
    read_by_size: float
    num_torn: int


def limits_of(measured: Measured) -> dict[str, Spread]:
    """Return the limits, without the warm-up round."""
    rounds = _timed(measured.rounds.get(LIMITS, {})).values()
    return {name: Spread.of(one[name] for one in rounds) for name in next(iter(rounds), {})}


def rows_of(measured: Measured) -> list[Row]:
    """Return a row for each contestant with results of a timed round."""
    return [
        _row(measured, name, timed, num_torn=sum(not one["is_snapshot"] for one in measured.rounds[name].values()))
        for name, timed in _contestants(measured).items()
    ]


def sharded_rows_of(measured: Measured) -> dict[str, ShardedRow]:
    """Return a row for each contestant with results of a timed round."""
    found = {}
    for name, rounds in _contestants(measured).items():
        consolidated = [one["consolidate_s"] for one in rounds.values() if "consolidate_s" in one]
        found[name] = ShardedRow(
            load_by_read=_load_by_read(measured, rounds, "memcpy_share_s"),
            written_by_size=statistics.median(one["written_bytes"] / measured.num_bytes for one in rounds.values()),
            received_bytes=statistics.median(one["received_bytes"] for one in rounds.values()),
            consolidate_s=Spread.of(consolidated) if consolidated else None,
        )
    return found


def loads_of(measured: Measured) -> dict[str, LoadRow]:
    """Return a row for each contestant that a world loaded only."""
    found = {}
    for name, rounds in _contestants(measured).items():
        found[name] = LoadRow(
            load_s=Spread.of(one["load_s"] for one in rounds.values()),
            load_by_read=_load_by_read(measured, rounds, "memcpy_share_s"),
            read_by_size=statistics.median(one["read_bytes"] / one["checkpoint_bytes"] for one in rounds.values()),
            num_torn=sum(not one["is_snapshot"] for one in measured.rounds[name].values()),
        )
    return found


def _contestants(measured: Measured) -> dict[str, dict[int, dict[str, Any]]]:
    """Return the timed rounds in which the limits were measured too, by contestant."""
    limits = measured.rounds.get(LIMITS, {})
    found = {}
    for name, rounds in measured.rounds.items():
        timed = {number: one for number, one in _timed(rounds).items() if number in limits}
        if name != LIMITS and timed:
            found[name] = timed
    return found


def _load_by_read(measured: Measured, rounds: dict[int, dict[str, Any]], copy: str) -> float:
    limits = measured.rounds[LIMITS]
    return Spread.of(
        one["load_s"] / (one["raw_read_s"] + limits[number][copy]) for number, one in rounds.items()
    ).median


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
        load_by_read=_load_by_read(measured, rounds, "memcpy_s"),
        read_by_size=statistics.median(one["read_bytes"] / one["checkpoint_bytes"] for one in numbers),
        file_by_size=statistics.median(one["checkpoint_bytes"] / measured.num_bytes for one in numbers),
        extra_bytes=measured.extra_bytes.get(name),
        step_ratio=statistics.median(
            statistics.median(one["steps_during_s"]) / statistics.median(one["steps_without_s"]) for one in numbers
        ),
        num_torn=num_torn,
    )
