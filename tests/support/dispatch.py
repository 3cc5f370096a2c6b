"""Send one call to many ranks, wait for every rank's outcome, release the ranks."""

import time
import warnings
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from multiprocessing.connection import wait
from typing import Any

from tests.support.handle import RankHandle
from tests.support.limits import PROGRAM_LIMIT_S
from tests.support.locate import reference_to
from tests.support.messages import Idle, Outcome, Release, Task, UserMessage, pack, unpack
from tests.support.report import RankEnd
from tests.support.runtime import JobEnvironment
from tests.support.store import shared_store

_GRACE_S = 3.0
"""How long the other ranks may run after one has failed, so that they can report too."""


@dataclass(frozen=True, kw_only=True)
class Call:
    """A function, its arguments, and the environment to run it in."""

    function: Callable[..., object]
    args: tuple[object, ...] = ()
    kwargs: Mapping[str, object] = field(default_factory=dict)
    backend: str | None = "gloo"
    environment: Mapping[str, str] = field(default_factory=dict)
    collective_timeout_s: float = 2 * PROGRAM_LIMIT_S
    fresh: bool = False

    @property
    def name(self) -> str:
        """The function's module and name."""
        return f"{self.function.__module__}.{self.function.__qualname__}"


class Dispatch:
    """A call that runs on ranks.

    Args:
        call: the call.
        handles: the ranks, in rank order.
    """

    def __init__(self, call: Call, handles: Sequence[RankHandle]) -> None:
        self._handles = list(handles)
        self._ends: dict[int, RankEnd] = {}
        self._payloads: list[deque[object]] = [deque() for _ in handles]
        arguments = _pack_arguments(call)
        reference, filters = reference_to(call.function), _pack_filters()
        number = shared_store().next_number()
        self._job = JobEnvironment(len(handles), number)
        for rank, handle in enumerate(handles):
            handle.clear_output()
            environment = {**self._job.environment(rank), **call.environment}
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

    def receive(self, rank: int, deadline: float) -> object:
        """Return the next payload from `rank`.

        Raises:
            LookupError: the rank ended without sending one, or the deadline has passed.
        """
        while not self._payloads[rank]:
            if rank in self._ends:
                end = self._ends[rank]
                raise LookupError(f"rank {rank} {end.kind} without sending a payload: {end.reason}\n{end.traceback}")
            if not self._receive_messages(deadline):
                stacks = self._handles[rank].stacks()
                raise LookupError(f"rank {rank} sent no payload in time; its stack:\n{stacks}")
        return self._payloads[rank].popleft()

    def collect(self, timeout_s: float, *, may_fail: Sequence[int] = ()) -> list[RankEnd]:
        """Wait for every rank's end and return the ends, in rank order.

        After the first failure on a rank outside `may_fail` the others have `_GRACE_S` left. Ranks that still run then
        are `hung`: their stacks are taken, and the caller kills them.
        """
        deadline, why = time.monotonic() + timeout_s, f"still running after {timeout_s:g} s"
        while len(self._ends) < len(self._handles):
            failed = [end.rank for end in self._ends.values() if end.failed and end.rank not in may_fail]
            if failed and deadline > time.monotonic() + _GRACE_S:
                deadline = time.monotonic() + _GRACE_S
                why = f"still running {_GRACE_S:g} s after rank {failed[0]} failed"
            if not self._receive_messages(deadline):
                break
        for rank, handle in enumerate(self._handles):
            if rank not in self._ends:
                self._ends[rank] = RankEnd(rank=rank, kind="hung", reason=why, traceback=handle.stacks())
        ends = [self._ends[rank] for rank in range(len(self._handles))]
        return [replace(end, output=self._handles[end.rank].output()) for end in ends]

    def release(self) -> None:
        """Let the waiting ranks destroy their process groups."""
        for rank, end in self._ends.items():
            if end.kind in {"returned", "skipped", "xfailed"}:
                with suppress(ConnectionError):  # the rank was killed while it waited
                    self._handles[rank].send(Release())

    def wait_idle(self) -> tuple[str, ...]:
        """Wait until released ranks of a pool can take another task; return what the task left behind."""
        deadline = time.monotonic() + PROGRAM_LIMIT_S
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

    def close(self) -> None:
        """Stop the job's servers."""
        self._job.close()

    def _receive_messages(self, deadline: float) -> bool:
        """Handle the messages that have arrived, waiting until the deadline; return False when it has passed."""
        running = {handle.connection: rank for rank, handle in enumerate(self._handles) if rank not in self._ends}
        ready = wait(list(running), max(0.0, deadline - time.monotonic()))
        for connection in ready:
            self._handle_message(running[connection])  # type: ignore[index]  # only Connections were passed
        return bool(ready)

    def _handle_message(self, rank: int) -> None:
        handle = self._handles[rank]
        try:
            message = handle.receive()
        except (EOFError, ConnectionError):
            end = RankEnd(rank=rank, kind="died")
            code = handle.wait_exit(5.0)
            stacks = handle.crash_stacks()
            self._ends[rank] = replace(end, reason=_describe_death(code), traceback=stacks, exit_code=code)
            return
        if isinstance(message, UserMessage):
            self._payloads[rank].append(unpack(message.payload))
        elif isinstance(message, Outcome):
            self._ends[rank] = RankEnd(
                rank=rank,
                kind=message.kind,
                value=unpack(message.value) if message.kind == "returned" else None,
                reason=message.reason,
                traceback=message.traceback,
                at_s=message.at_s,
            )
        else:
            raise TypeError(f"rank {rank} should have sent UserMessage or Outcome, got {message!r}")


def _pack_arguments(call: Call) -> bytes:
    for name, value in [*enumerate(call.args), *call.kwargs.items()]:
        try:
            pack(value)
        except Exception as error:
            raise TypeError(
                f"argument {name!r} of {call.name} cannot be sent to the ranks ({error}); pass plain data, or create "
                f"the object in the function's body, which runs on the rank"
            ) from error
    return pack((call.args, dict(call.kwargs)))


def _pack_filters() -> tuple[bytes, ...]:
    packed = []
    entry: Any
    for entry in warnings.filters:
        with suppress(Exception):  # a category that only this process knows cannot match on a rank
            packed.append(pack(entry))
    return tuple(packed)


def _describe_death(code: int | None) -> str:
    if code is None:
        return "closed its pipe but still runs"
    return f"killed by signal {-code}" if code < 0 else f"exited with {code} without an outcome"
