"""``distckpt diff``: compare two checkpoints key by key.

Both are read once, in chunks, by several threads. Tensors are compared bit by bit first: differences are computed only
where bits differ. Keys are compared by their names, so that a nested file and a flat one can be equal.
"""

import argparse
import ctypes
import itertools
import math
import os
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from distckpt.cli.output import Column, ExitCode, Output, Table, count, format_number
from distckpt.cli.progress import Progress
from distckpt.cli.sources import (
    CHUNK_BYTES,
    Source,
    chunk_ranges,
    describe_value,
    num_bytes_of,
    open_source,
    read_chunk,
    unique_names,
)
from distckpt.cli.structure import is_plain_tensor

_MOST_THREADS = 4
_PART = 1 << 20
"""Number of elements that are compared at once. A 32-bit float holds it exactly."""
_memcmp = ctypes.CDLL(None).memcmp
_memcmp.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
_SHORT_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
_LONG_INTEGERS = (torch.int64, torch.uint64)
_EXACT_BELOW = 2.0**62
_CHANGES = (Column("KEY", can_shrink=True), Column("CHANGE"), Column("FIRST"), Column("SECOND"))
_VALUES = (
    Column("KEY", can_shrink=True),
    Column("LARGEST", is_number=True),
    Column("MEAN", is_number=True),
    Column("DIFFERENT", is_number=True),
    Column("NAN IN ONE", is_number=True, least_width=80),
)


@dataclass(slots=True)
class Difference:
    """The difference between two tensors of one shape and dtype.

    Attributes:
        num_elements: number of elements of each tensor.
        num_different: number of elements with different values; NaN equals NaN.
        num_nan: number of elements that are NaN in only one of the two.
        largest: the largest absolute difference of the other elements.
        total: the sum of the absolute differences of the other elements.
        has_other_bits: True if any bit differs, as between 0.0 and -0.0.
    """

    num_elements: int
    num_different: int = 0
    num_nan: int = 0
    largest: float = 0.0
    total: float = 0.0
    has_other_bits: bool = False

    @property
    def mean(self) -> float:
        """The mean absolute difference of the elements that are not NaN."""
        return self.total / max(self.num_elements - self.num_nan, 1)

    def add(self, other: "Difference") -> None:
        """Add the difference of further elements of the same tensors."""
        self.num_different += other.num_different
        self.num_nan += other.num_nan
        self.largest = max(self.largest, other.largest)
        self.total += other.total
        self.has_other_bits |= other.has_other_bits


class Change(NamedTuple):
    """A key whose type, dtype, shape or value differs.

    Attributes:
        name: the key.
        kind: ``type``, ``dtype``, ``shape`` or ``value``.
        before: a description of the first checkpoint's value.
        after: a description of the second checkpoint's value.
    """

    name: str
    kind: str
    before: str
    after: str


class _Pair(NamedTuple):
    name: str
    one: torch.Tensor
    other: torch.Tensor


def run(arguments: argparse.Namespace, output: Output) -> int:
    """Run the command; return its exit code."""
    with ExitStack() as stack:
        first, second = (stack.enter_context(open_source(path)) for path in (arguments.first, arguments.second))
        before, after = (dict(unique_names(one.state)) for one in (first, second))
        changes, pairs, num_equal = list[Change](), list[_Pair](), 0
        for name in (name for name in before if name in after):
            change = _compare_forms(name, before[name], after[name])
            if change is not None:
                changes.append(change)
            elif is_plain_tensor(before[name]):
                pairs.append(_Pair(name, before[name], after[name]))
            else:
                num_equal += 1
        found = _compare_all(first, second, pairs)
    differing = {name: one for name, one in found.items() if one.has_other_bits}
    num_equal += len(found) - len(differing)
    only = [[name for name in one if name not in other] for one, other in ((before, after), (after, before))]
    output.json(
        {
            "first": str(arguments.first),
            "second": str(arguments.second),
            "only_in_first": only[0],
            "only_in_second": only[1],
            "changes": [change._asdict() for change in changes],
            "tensors": [_document(name, one) for name, one in differing.items()],
            "num_equal": num_equal,
        }
    )
    for path, names, values in ((arguments.first, only[0], before), (arguments.second, only[1], after)):
        if names:
            table = Table(title=f"only in {path}", columns=(Column("KEY", can_shrink=True), Column("WHAT")))
            table.rows.extend((name, describe_value(values[name])) for name in names)
            output.table(table)
            output.line()
    _print_changes(changes, differing, output)
    num_differing = len(only[0]) + len(only[1]) + len(changes) + len(differing)
    output.line(f"{count(num_differing, 'key')} {'differs' if num_differing == 1 else 'differ'}, {num_equal} are equal")
    return ExitCode.FOUND if num_differing else ExitCode.OK


def _document(name: str, one: Difference) -> dict[str, Any]:
    return {
        "name": name,
        "largest": one.largest,
        "mean": one.mean,
        "num_different": one.num_different,
        "num_nan": one.num_nan,
        "num_elements": one.num_elements,
    }


def _print_changes(changes: Sequence[Change], differing: dict[str, Difference], output: Output) -> None:
    if changes:
        output.table(Table(title="changed", columns=_CHANGES, rows=list(changes)))
        output.line()
    if differing:
        table = Table(title="other values", columns=_VALUES)
        for name, one in differing.items():
            share = "bits only" if not one.num_different else f"{one.num_different} of {one.num_elements}"
            largest, mean = format_number(one.largest), format_number(one.mean)
            table.rows.append((name, largest, mean, share, str(one.num_nan)))
        output.table(table)
        output.line()


def _compare_forms(name: str, one: Any, other: Any) -> Change | None:
    """Return the change of type, dtype, shape or plain value; None if only elements of tensors can differ."""
    is_tensor = is_plain_tensor(one)
    if is_tensor != is_plain_tensor(other) or (not is_tensor and type(one) is not type(other)):
        return Change(name, "type", describe_value(one), describe_value(other))
    if not is_tensor:
        return None if _equal(one, other) else Change(name, "value", describe_value(one), describe_value(other))
    if one.shape != other.shape:
        return Change(name, "shape", str(tuple(one.shape)), str(tuple(other.shape)))
    if one.dtype != other.dtype:
        return Change(name, "dtype", *(str(each.dtype).removeprefix("torch.") for each in (one, other)))
    return None


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, float) and isinstance(other, float):
        return one == other or (math.isnan(one) and math.isnan(other))
    try:
        if isinstance(one, torch.Tensor):  # sparse or quantised
            return one.layout == other.layout and torch.equal(one.to_dense(), other.to_dense())
        return bool(
            (one == other) if not hasattr(one, "shape") else (one.shape == other.shape and (one == other).all())
        )
    except Exception:  # noqa: BLE001 - a class's own method; values that cannot be compared count as different
        return False


def _compare_all(first: Source, second: Source, pairs: Sequence[_Pair]) -> dict[str, Difference]:
    """Return the difference of each pair, by name."""
    found = {pair.name: Difference(num_elements=pair.one.numel()) for pair in pairs}
    tasks = [(pair, *one) for pair in pairs for one in _ranges(pair)]
    counter, lock, stop = itertools.count(), threading.Lock(), threading.Event()
    num_bytes = 2 * sum(num_bytes_of(pair.one) for pair in pairs)

    def work() -> None:
        buffers = [torch.empty(CHUNK_BYTES, dtype=torch.uint8) for _ in range(2)]
        for number in counter:
            if number >= len(tasks) or stop.is_set():
                return
            pair, begin, end = tasks[number]
            one = read_chunk(first, pair.one, begin, end, buffers[0])
            other = read_chunk(second, pair.other, begin, end, buffers[1])
            difference = compare(one, other)
            with lock:
                found[pair.name].add(difference)
            progress.advance(2 * one.numel() * one.element_size())

    num_threads = max(1, min(_MOST_THREADS, len(os.sched_getaffinity(0)), len(tasks)))
    with (
        Progress("comparing", num_bytes) as progress,
        first.reading(),
        second.reading(),
        ThreadPoolExecutor(num_threads, thread_name_prefix="distckpt-diff") as pool,
    ):
        futures = [pool.submit(work) for _ in range(num_threads)]
        try:
            for future in futures:
                future.result()
        finally:
            stop.set()
    return found


def _ranges(pair: _Pair) -> list[tuple[int, int]]:
    """Return the ranges of elements to compare: one range if either tensor is not contiguous."""
    ranges = chunk_ranges(pair.one), chunk_ranges(pair.other)
    return min(ranges, key=len)


def compare(one: torch.Tensor, other: torch.Tensor) -> Difference:
    """Compare elements of one dtype.

    Args:
        one: (n,), contiguous.
        other: (n,), contiguous.

    Example:
        >>> nan = float("nan")
        >>> found = compare(torch.tensor([1.0, 2.0, nan, nan]), torch.tensor([1.0, 2.5, nan, 1.0]))
        >>> found.largest, found.num_different, found.num_nan, round(found.mean, 4)
        (0.5, 2, 1, 0.1667)
    """
    difference = Difference(num_elements=one.numel())
    for part, other_part in zip(torch.split(one, _PART), torch.split(other, _PART), strict=True):
        if _memcmp(part.data_ptr(), other_part.data_ptr(), part.numel() * part.element_size()):
            _add_part(difference, part, other_part)
    return difference


def _add_part(difference: Difference, one: torch.Tensor, other: torch.Tensor) -> None:
    """Add the differences of two chunks that are not bit-equal."""
    difference.has_other_bits = True
    numbers = [_as_numbers(each) for each in (one, other)]
    apart = (numbers[0] - numbers[1]).abs_()
    if one.dtype in _LONG_INTEGERS:  # float64 does not hold all of them, nor int64 all differences
        exact = (one.view(torch.int64) - other.view(torch.int64)).abs_().to(torch.float64)
        apart = torch.where(apart < _EXACT_BELOW, exact, apart)
    if apart.dim() > 1:  # real and imaginary parts
        apart = torch.linalg.vector_norm(apart, dim=-1)
    total = float(apart.sum())
    if math.isnan(total):
        are_nan = [each.isnan().reshape(len(apart), -1).any(-1) for each in numbers]
        are_equal = (numbers[0] == numbers[1]).reshape(len(apart), -1).all(-1) | (are_nan[0] & are_nan[1])
        in_one = are_nan[0] ^ are_nan[1]
        num_nan = int(in_one.sum())
        difference.num_nan += num_nan
        difference.num_different += num_nan
        apart = apart.masked_fill(are_equal | in_one, 0.0).nan_to_num(nan=math.inf, posinf=math.inf)
        total = float(apart.sum())
    difference.total += total
    difference.largest = max(difference.largest, float(apart.max()))
    difference.num_different += int(apart.sign_().sum())  # 50 times as fast as count_nonzero


def _as_numbers(one: torch.Tensor) -> torch.Tensor:
    """Return elements as float64, or as float32 where their dtype is a 32-bit or 16-bit float."""
    if one.is_complex():
        return torch.view_as_real(one).to(torch.float64)
    return one.to(torch.float32 if one.dtype in _SHORT_FLOATS else torch.float64)
