"""Signals of the operating system, received without getting in the way of those who handled them before.

Owns who is installed, who is called on, and what was received. Must not know what a signal means to a run.
"""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from types import FrameType
from typing import Any

__all__ = ["SignalReceiver", "check_signals"]

_Handler = Callable[[int, FrameType | None], Any] | int | signal.Handlers | None


def check_signals(signals: object) -> list[int]:
    """Return the signals' numbers, each once.

    Raises:
        TypeError: they are no numbers.
        ValueError: there is none, or one that cannot be handled.
    """
    given = list(signals) if isinstance(signals, Iterable) else [None]
    numbers = list(dict.fromkeys(int(one) for one in given if isinstance(one, int) and not isinstance(one, bool)))
    if not all(isinstance(one, int) and not isinstance(one, bool) for one in given):
        msg = f"Argument signals should be several signals' numbers, as (signal.SIGTERM,), but given {signals!r}"
        raise TypeError(msg)
    if not numbers:
        msg = "Argument signals should name at least one signal, but is empty"
        raise ValueError(msg)
    for number in numbers:
        if number not in signal.valid_signals() or number in (signal.SIGKILL, signal.SIGSTOP):
            msg = f"Argument signals should name signals that a process can handle, but given {_name_of(number)}"
            raise ValueError(msg)
    return numbers


class SignalReceiver:
    """What receives the signals. It knows no engine, so that a handler left installed keeps no model alive.

    A deep copy is this one itself: there is one process to be told. In another process, forked or unpickled, it
    receives nothing; a signal does there what it would do without it.

    Attributes:
        received: the first signal's name, and when it came, by the monotonic clock.
    """

    def __init__(self, numbers: Sequence[int]) -> None:
        self.received: tuple[str, float] | None = None
        self._numbers = numbers
        self._before: dict[int, _Handler] = {}
        self._pid: int | None = None  # where it receives

    def __deepcopy__(self, memo: dict[int, Any]) -> "SignalReceiver":
        """Return itself."""
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        """Leave behind what was installed."""
        return (SignalReceiver, (self._numbers,))

    def install(self) -> bool:
        """Begin to receive; return whether this thread may."""
        if threading.current_thread() is not threading.main_thread():
            return False
        self._pid = os.getpid()
        for number in self._numbers:
            self._before[number] = signal.getsignal(number)  # known before the first one can come
            signal.signal(number, self._catch)
        return True

    def remove(self) -> None:
        """Put back what was there, unless somebody else has come since. Outside the main thread: let it pass."""
        self._pid = None
        if threading.current_thread() is not threading.main_thread():
            return
        for number in self._before:
            if signal.getsignal(number) == self._catch:
                signal.signal(number, self._whom_before(number))

    def _is_open(self) -> bool:
        return self._pid == os.getpid()

    def _whom_before(self, number: int) -> Callable[[int, FrameType | None], Any] | int | signal.Handlers:
        """Return who handled a signal before, and still wants to; the default for one that Python did not know."""
        before = self._before.get(number)
        owner = getattr(before, "__self__", None)
        if isinstance(owner, SignalReceiver) and not owner._is_open():  # noqa: SLF001 - one of its kind
            return owner._whom_before(number)  # noqa: SLF001 - as above
        return signal.SIG_DFL if before is None else before

    def _catch(self, number: int, frame: FrameType | None) -> None:
        # No logging here: the main thread may be in the middle of it.
        is_open = self._is_open()
        if is_open and self.received is None:
            self.received = (_name_of(number), time.monotonic())
        before = self._whom_before(number)
        if is_open and before is signal.default_int_handler:
            return
        if callable(before):
            before(number, frame)
        elif not is_open and before == signal.SIG_DFL and signal.getsignal(number) == self._catch:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)


def _name_of(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # one of the real-time signals between the first and the last
        return f"signal {number}"
