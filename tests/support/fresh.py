"""Ranks for one test only: for signals, kills and exit codes, which would damage a pool."""

import contextlib
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from tests.support.dispatch import Call, Dispatch
from tests.support.handle import RankHandle
from tests.support.limits import PROGRAM_LIMIT_S
from tests.support.report import RankEnd, RankFailedError
from tests.support.start import start


class FreshRanks:
    """A call that runs on fresh processes. `fresh_ranks` makes it."""

    def __init__(self, call: Call, handles: Sequence[RankHandle]) -> None:
        self._call, self._handles = call, handles
        self._dispatch = Dispatch(call, handles)

    def pid(self, rank: int) -> int:
        """Return the process id of a rank, to signal it."""
        return self._handles[rank].pid

    def receive(self, rank: int, *, timeout_s: float = PROGRAM_LIMIT_S) -> object:
        """Return the next payload that a rank sends with `send_to_parent`."""
        return self._dispatch.receive(rank, time.monotonic() + timeout_s)

    def finish(self, *, timeout_s: float = PROGRAM_LIMIT_S, may_fail: Sequence[int] = ()) -> list[RankEnd]:
        """Wait until every rank's function and process has ended.

        Args:
            timeout_s: limit for the functions; a rank that exceeds it is `hung`, and is killed.
            may_fail: ranks that are expected to fail (by an exception, a death, a hang or an exit code).

        Returns:
            Each rank's end, in rank order, with its exit code.

        Raises:
            RankFailedError: another rank failed.
        """
        ends = self._dispatch.collect(timeout_s, may_fail=may_fail)
        self._dispatch.release()
        ends = [self._wait_exit(end) for end in ends]
        self._dispatch.close()
        if any(end.failed and end.rank not in may_fail for end in ends):
            raise RankFailedError(self._call.name, ends, limit_s=timeout_s)
        return ends

    def _wait_exit(self, end: RankEnd) -> RankEnd:
        if end.kind == "hung":
            return end
        handle = self._handles[end.rank]
        code = handle.wait_exit(PROGRAM_LIMIT_S)  # Horovod alone may take 30 s after a death
        if code is None:
            reason = f"{end.kind}, but the process does not end"
            return replace(end, kind="hung", reason=reason, traceback=handle.stacks())
        if code != 0 and not end.failed:
            return replace(end, kind="died", reason=f"{end.kind}, then ended with {code}", exit_code=code)
        return replace(end, exit_code=code)


@contextlib.contextmanager
def fresh_ranks(
    function: Callable[..., object],
    world_size: int = 2,
    *args: object,
    backend: str | None = "gloo",
    env: Mapping[str, str] | None = None,
    collective_timeout_s: float = 2 * PROGRAM_LIMIT_S,
) -> Iterator[FreshRanks]:
    """Start `function(*args)` on new processes, which are killed when the block ends.

    Args:
        function: a module-level function; runs on each rank.
        world_size: number of ranks.
        *args: picklable arguments.
        backend: backend of the default process group; None leaves torch.distributed uninitialised.
        env: additional environment variables, set before the processes start.
        collective_timeout_s: timeout of the default process group.

    Example:
        with fresh_ranks(_trains_for_ever, 2, tmp_path) as ranks:
            assert ranks.receive(1) == "in the first epoch"
            os.kill(ranks.pid(1), signal.SIGKILL)
            ends = ranks.finish(may_fail=[1])
        assert ends[1].exit_code == -signal.SIGKILL
    """
    call = Call(
        function=function,
        args=args,
        backend=backend,
        environment=env or {},
        collective_timeout_s=collective_timeout_s,
        fresh=True,
    )
    with tempfile.TemporaryDirectory(prefix="distckpt-ranks-") as directory, contextlib.ExitStack() as stack:
        handles = []
        for handle in start(world_size, Path(directory), environment=env):
            stack.callback(handle.kill)
            handles.append(handle)
        for handle in handles:
            handle.wait_ready()
        yield FreshRanks(call, handles)
