"""One function on many ranks: send it, wait for every rank's outcome, release them.

Owns the wait. Knows rank handles, not where they come from nor what becomes of them.
"""

import time
import warnings
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from multiprocessing.connection import wait
from typing import Any

from tests.support.handle import RankHandle
from tests.support.locate import refer_to
from tests.support.messages import Idle, Outcome, Release, Task, Told, pack, unpack
from tests.support.report import RankEnd
from tests.support.runtime import Surroundings
from tests.support.store import shared_store

_GRACE_S = 3.0
"""How long the other ranks have to tell their side once one has failed."""
_RELEASE_LIMIT_S = 10.0


@dataclass(frozen=True, kw_only=True)
class Call:
    """What to run, and in which surroundings."""

    function: Callable[..., object]
    args: tuple[object, ...] = ()
    kwargs: Mapping[str, object] = field(default_factory=dict)
    backend: str | None = "gloo"
    environment: Mapping[str, str] = field(default_factory=dict)
    collective_timeout_s: float = 120.0
    fresh: bool = False

    @property
    def name(self) -> str:
        """Where it is defined, for people."""
        return f"{self.function.__module__}.{self.function.__qualname__}"


class Dispatch:
    """A call under way."""

    def __init__(self, call: Call, handles: Sequence[RankHandle]) -> None:
        self._handles = list(handles)
        self._ends: dict[int, RankEnd] = {}
        self._told: list[deque[object]] = [deque() for _ in handles]
        arguments = _pack_arguments(call)
        reference, filters = refer_to(call.function), _pack_filters()
        number = shared_store().next_number()
        self._surroundings = Surroundings(len(handles), number)
        for rank, handle in enumerate(handles):
            handle.forget_output()
            environment = {**self._surroundings.environment(rank), **call.environment}
            handle.send(
                Task(
                    function=reference,
                    arguments=arguments,
                    environment=environment,
                    number=number,
                    backend=call.backend,
                    collective_timeout_s=call.collective_timeout_s,
                    warning_filters=filters,
                    fresh=call.fresh,
                )
            )

    def told(self, rank: int, deadline: float) -> object:
        """Return the next payload that `rank` told.

        Raises:
            LookupError: the rank ended without telling it, or the deadline has passed.
        """
        while not self._told[rank]:
            if rank in self._ends:
                end = self._ends[rank]
                raise LookupError(f"rank {rank} {end.kind} before telling: {end.reason}\n{end.traceback}")
            if not self._pump(deadline):
                stacks = self._handles[rank].stacks()
                raise LookupError(f"rank {rank} told nothing in time; its stack:\n{stacks}")
        return self._told[rank].popleft()

    def collect(self, timeout_s: float, *, may_fail: Sequence[int] = ()) -> list[RankEnd]:
        """Wait for the end of every rank.

        After the first failure on a rank outside `may_fail` the others have `_GRACE_S` left. Those that
        still run then are `hung`: their stacks are taken, the caller kills them.
        """
        deadline, why = time.monotonic() + timeout_s, f"still running after {timeout_s:g} s"
        while len(self._ends) < len(self._handles):
            failed = [end.rank for end in self._ends.values() if end.failed and end.rank not in may_fail]
            if failed and deadline > time.monotonic() + _GRACE_S:
                deadline = time.monotonic() + _GRACE_S
                why = f"still running {_GRACE_S:g} s after rank {failed[0]} had failed"
            if not self._pump(deadline):
                break
        for rank, handle in enumerate(self._handles):
            if rank not in self._ends:
                self._end(RankEnd(rank=rank, kind="hung", reason=why, traceback=handle.stacks()))
        ends = [self._ends[rank] for rank in range(len(self._handles))]
        return [replace(end, output=self._handles[end.rank].output()) for end in ends]

    def release(self) -> None:
        """Let the ranks that wait tear their process groups down."""
        for rank, end in self._ends.items():
            if end.kind in {"returned", "skipped", "xfailed"}:
                with suppress(ConnectionError):  # it was killed while it waited
                    self._handles[rank].send(Release())

    def wait_idle(self) -> tuple[str, ...]:
        """Wait until released ranks of a pool can take another task; say what the task left behind."""
        deadline = time.monotonic() + _RELEASE_LIMIT_S
        leftovers: list[str] = []
        for rank, handle in enumerate(self._handles):
            try:
                if not handle.connection.poll(max(0.0, deadline - time.monotonic())):
                    leftovers.append(f"rank {rank}: does not finish its process group\n{handle.stacks()}")
                    continue
                message = handle.receive()
            except (EOFError, ConnectionError):
                leftovers.append(f"rank {rank}: died after the test\n{handle.output()}")
                continue
            left = message.leftovers if isinstance(message, Idle) else (repr(message),)
            leftovers += [f"rank {rank}: {item}" for item in left]
        return tuple(leftovers)

    def end(self) -> None:
        """Let go of what the ranks found around them, once they have left."""
        self._surroundings.end()

    def _pump(self, deadline: float) -> bool:
        """Take in what has arrived, waiting until the deadline; False when it has passed."""
        open_ranks = {handle.connection: rank for rank, handle in enumerate(self._handles) if rank not in self._ends}
        ready = wait(list(open_ranks), max(0.0, deadline - time.monotonic()))
        for connection in ready:
            self._take(open_ranks[connection])  # type: ignore[index]  # we passed Connections only
        return bool(ready)

    def _take(self, rank: int) -> None:
        handle = self._handles[rank]
        try:
            message = handle.receive()
        except (EOFError, ConnectionError):
            code = handle.wait_exit(5.0)
            stacks = handle.crash_stacks()
            self._end(RankEnd(rank=rank, kind="died", reason=_death(code), traceback=stacks, exit_code=code))
            return
        if isinstance(message, Told):
            self._told[rank].append(unpack(message.payload))
        elif isinstance(message, Outcome):
            self._end(
                RankEnd(
                    rank=rank,
                    kind=message.kind,
                    value=unpack(message.value) if message.kind == "returned" else None,
                    reason=message.reason,
                    traceback=message.traceback,
                )
            )
        else:
            raise TypeError(f"rank {rank} should have sent Told or Outcome, got {message!r}")

    def _end(self, end: RankEnd) -> None:
        self._ends[end.rank] = replace(end, order=len(self._ends))


def _pack_arguments(call: Call) -> bytes:
    for name, value in [*enumerate(call.args), *call.kwargs.items()]:
        try:
            pack(value)
        except Exception as error:
            raise TypeError(
                f"argument {name!r} of {call.name} cannot be sent to the ranks ({error}); pass plain data, "
                f"or make it in the function's body: it runs on the rank"
            ) from error
    return pack((call.args, dict(call.kwargs)))


def _pack_filters() -> tuple[bytes, ...]:
    packed = []
    entry: Any
    for entry in warnings.filters:
        with suppress(Exception):  # a category that exists in this process only matches nothing elsewhere
            packed.append(pack(entry))
    return tuple(packed)


def _death(code: int | None) -> str:
    if code is None:
        return "closed its pipe and lives on"
    return f"killed by signal {-code}" if code < 0 else f"exited with {code} without a word"
