"""The faults of the system calls of a save: all of them, or a selection."""

import errno
import itertools
from collections.abc import Iterator, Sequence
from typing import Literal

from tests.crash.shim import Called, Fault, How

__all__ = ["Extent", "faults_of"]

# EINTR only once: Python repeats the call for as long as it fails so.
_ERRORS = (errno.EIO, errno.ENOSPC, errno.EDQUOT)
_SAMPLE_EACH = 11
Extent = Literal["whole", "quick", "sample"]


def faults_of(calls: Sequence[Called], extent: Extent) -> Iterator[Fault]:
    """Yield each call's failures.

    Args:
        calls: the calls of a save without faults.
        extent: `whole`: each call with each error, once and from then on. `quick`: each call with some errors.
            `sample`: every eleventh of these, and at least one of each call.
    """
    seen: set[str] = set()
    for number, fault in enumerate(_faults_of(calls, is_whole=extent == "whole")):
        if extent != "sample" or number % _SAMPLE_EACH == 0 or fault.call not in seen:
            yield fault
        seen.add(fault.call)


def _faults_of(calls: Sequence[Called], *, is_whole: bool) -> Iterator[Fault]:
    names = [call.name for call in calls]
    taking_turns = itertools.cycle((errno.ENOSPC, errno.EINTR, errno.EDQUOT))
    for name in sorted(set(names)):
        for nth in range(1, names.count(name) + 1):
            for code in (*_ERRORS, errno.EINTR) if is_whole else (errno.EIO, next(taking_turns)):
                yield Fault(call=name, nth=nth, errno=code)
            for code in _ERRORS if is_whole else ():
                yield Fault(call=name, nth=nth, errno=code, for_ever=True)
            yield from _of_its_own(name, nth, is_last=nth == names.count(name))
    one_each = itertools.cycle(_ERRORS)
    for nth in range(1, len(names) + 1):
        for code in _ERRORS if is_whole else (next(one_each),):
            yield Fault(call="*", nth=nth, errno=code, for_ever=True)


def _of_its_own(name: str, nth: int, *, is_last: bool) -> Iterator[Fault]:
    """Yield the faults that only this kind of call can have."""
    if name == "write":
        for how in (How.SHORT, How.ZERO, How.TORN):
            yield Fault(call=name, nth=nth, how=how)
        if not is_last:
            yield Fault(call=name, nth=nth, how=How.SHORT_THEN_REFUSED, errno=errno.ENOSPC)
    if name in {"write", "fsync", "rename", "unlink"}:
        yield Fault(call=name, nth=nth, how=How.DONE_BUT_REPORTED_AS_FAILED)
    if name == "fsync":
        yield Fault(call=name, nth=nth, errno=errno.EINVAL)  # no harm on a directory
